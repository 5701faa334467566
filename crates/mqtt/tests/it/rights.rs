//! Rights end while a client is connected.

use std::time::Duration;

use fieldline_auth::NewToken;
use fieldline_contracts::{Actor, Clock as _, Kind, RegistryExt as _, SystemClock};
use fieldline_model::{Account, Scope, Token};

use crate::harness::Server;
use crate::wire::{Hello, Wire};

#[tokio::test]
async fn a_revoked_or_changed_token_ends_its_connections() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let registry = server.services.platform.registry.clone();
    let by = Actor::system("test");
    let new = |name: &str| NewToken {
        name: name.into(),
        scopes: vec![Scope::Read, Scope::Publish],
        ..NewToken::default()
    };
    let (revoked, secret) = server.new_token(tenant.account, new("revoked")).await;
    let (changed, other) = server.new_token(tenant.account, new("changed")).await;
    let mut hello = Hello::new(true, "a", &secret);
    hello.will = Some(("client/will", "unwanted", 1, false));
    let (mut first, _) = Wire::hello(&server, &hello).await;
    let mut second = Wire::join(&server, true, "b", &other).await;
    let mut stays = Wire::join(&server, true, "c", &tenant.token).await;
    stays.subscribe("client/#", 0).await;

    registry.delete(tenant.account, Kind::Token, revoked.0, None, &by).await.unwrap();
    let begun = std::time::Instant::now();
    assert_eq!(first.closed().await, Some(0x87));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());

    let found = registry.get_object::<Token>(tenant.account, changed.0).await.unwrap().unwrap();
    let mut token = found.object;
    token.scopes = vec![Scope::Read];
    registry.update_object(tenant.account, &token, None, &by).await.unwrap();
    assert_eq!(second.closed().await, Some(0x87));

    // Without its rights a client publishes no will; the others are left alone.
    stays.silent().await;
    stays.send(&[0xc0, 0]).await;
    assert_eq!(stays.recv().await.first, 0xd0);
    let mut again = Wire::open(&server).await;
    again.send(&Hello::new(true, "a", &secret).bytes()).await;
    assert_eq!(again.recv().await.body[1], 0x86);
}

#[tokio::test]
async fn an_expired_token_ends_its_connections() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let new = NewToken {
        name: "brief".into(),
        scopes: vec![Scope::Read],
        expires_at: Some(SystemClock.now().plus_micros(1_500_000)),
        ..NewToken::default()
    };
    let (_, secret) = server.new_token(tenant.account, new).await;
    let mut wire = Wire::join(&server, true, "c", &secret).await;
    let begun = std::time::Instant::now();
    assert_eq!(wire.closed().await, Some(0x87));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_disabled_account_is_out() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let mut wire = Wire::join(&server, true, "c", &tenant.token).await;
    let registry = server.services.platform.registry.clone();
    let found = registry.get_object::<Account>(tenant.account, tenant.account.0).await;
    let mut account = found.unwrap().unwrap().object;
    account.enabled = false;
    registry.update_object(tenant.account, &account, None, &Actor::system("test")).await.unwrap();
    assert_eq!(wire.closed().await, Some(0x87));
    let mut again = Wire::open(&server).await;
    again.send(&Hello::new(true, "c", &tenant.token).bytes()).await;
    assert!(again.recv().await.body[1] >= 0x80);
}
