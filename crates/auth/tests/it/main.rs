//! Letting people and programs in, over a real registry.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use fieldline_auth::{
    Auth, AuthError, Bootstrap, Identity, IdentityKind, LINK_AGE_MICROS_MAX, NewToken, NewUser,
    SESSION_IDLE_MICROS, SESSIONS_MAX, SignedIn,
};
use fieldline_contracts::{Actor, Draft, Kind, Page, Registry, RegistryExt as _, TestClock};
use fieldline_model::{
    Account, DeviceId, Event, EventId, EventKind, Params, Scope, Timestamp, Token, User,
};
use fieldline_sqlite::SqliteRegistry;

const PEER: &str = "192.0.2.7";
const PASSWORD: &str = "correct horse battery";

struct Bench {
    auth: Auth,
    registry: Arc<dyn Registry>,
    clock: Arc<TestClock>,
    _dir: tempfile::TempDir,
}

fn peer() -> IpAddr {
    PEER.parse().unwrap()
}

fn bench() -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let clock = Arc::new(TestClock::at(Timestamp::from_seconds(1_800_000_000)));
    let registry: Arc<dyn Registry> =
        Arc::new(SqliteRegistry::open(&dir.path().join("registry.sqlite"), clock.clone()).unwrap());
    Bench { auth: Auth::new(registry.clone(), clock.clone()), registry, clock, _dir: dir }
}

impl Bench {
    async fn start(&self) -> Bootstrap {
        self.auth.bootstrap(None).await.unwrap().unwrap()
    }

    async fn root(&self) -> Identity {
        let secret = self.start().await.token.unwrap();
        self.auth.token(&secret, peer()).await.unwrap()
    }

    /// A user `ada` with a password, made by `root`.
    async fn ada(&self, root: &Identity) -> User {
        let new = NewUser {
            name: "ada".to_owned(),
            scopes: vec![Scope::Read],
            password: Some(PASSWORD.to_owned()),
        };
        self.auth.create_user(root, root.account, new).await.unwrap().0.object
    }

    async fn sign_in(&self, password: &str) -> Result<SignedIn, AuthError> {
        self.auth.sign_in("ada", password, peer()).await
    }
}

fn unauthenticated<T>(result: Result<T, AuthError>) -> &'static str {
    match result {
        Err(AuthError::Unauthenticated(text)) => text,
        Err(other) => panic!("expected `Unauthenticated`, got {other:?}"),
        Ok(_) => panic!("expected `Unauthenticated`, was let in"),
    }
}

/// Waits for a state, never for an edge.
async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    for _ in 0..200 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("within two seconds it did not come to be: {what}");
}

#[tokio::test]
async fn a_first_start_gives_a_link_and_a_token_and_no_password() {
    let bench = bench();
    let first = bench.start().await;
    let secret = first.token.unwrap();
    assert!(secret.starts_with("flt_") && secret.len() == 44);
    let identity = bench.auth.token(&secret, peer()).await.unwrap();
    assert!(Scope::ALL.iter().all(|scope| identity.may(*scope)));
    assert_eq!(identity.actor.address.as_deref(), Some(PEER));

    let admin = bench.registry.find_anywhere(Kind::User, "name", "admin").await.unwrap().unwrap();
    assert!(admin.body.get("password_hash").is_none());
    unauthenticated(bench.auth.sign_in("admin", "", peer()).await);
    unauthenticated(bench.auth.sign_in("admin", "admin", peer()).await);

    let signed_in = bench.auth.redeem_link(&first.link_secret, peer()).await.unwrap();
    assert_eq!(signed_in.user.name, "admin");
    let session = bench.auth.session(&signed_in.secret, peer()).await.unwrap();
    assert!(session.may(Scope::Root) && matches!(session.kind, IdentityKind::User(_)));

    // A second start without a password gives another link, but no other token.
    let second = bench.start().await;
    assert!(second.token.is_none() && second.link_secret != first.link_secret);
    assert_eq!(
        bench.registry.list_everywhere(Kind::Account, &Page::first(9)).await.unwrap().len(),
        1
    );

    bench.auth.set_password(&session, None, PASSWORD.to_owned()).await.unwrap();
    assert!(
        bench.auth.bootstrap(None).await.unwrap().is_none(),
        "with a password, nothing is given"
    );
    unauthenticated(bench.auth.redeem_link(&second.link_secret, peer()).await);
    bench.auth.sign_in("admin", PASSWORD, peer()).await.unwrap();
}

#[tokio::test]
async fn a_token_given_by_the_operator_is_taken_and_not_shown() {
    let bench = bench();
    let given = "operators-own-secret-0123456789";
    for _ in 0..2 {
        let made = bench.auth.bootstrap(Some(given.to_owned())).await.unwrap().unwrap();
        assert!(made.token.is_none());
    }
    assert!(bench.auth.token(given, peer()).await.unwrap().may(Scope::Root));
    let tokens = bench.registry.list_everywhere(Kind::Token, &Page::first(9)).await.unwrap();
    assert_eq!(tokens.len(), 1);
    let refused = bench.auth.bootstrap(Some("short".to_owned())).await;
    assert!(matches!(refused, Err(AuthError::Refused(_))), "{refused:?}");
}

#[tokio::test]
async fn no_secret_is_kept() {
    let bench = bench();
    let root = bench.root().await;
    bench.ada(&root).await;
    let new = NewToken { name: "t".to_owned(), scopes: vec![Scope::Read], ..NewToken::default() };
    let (_, secret) = bench.auth.create_token(&root, root.account, new).await.unwrap();
    let session = bench.sign_in(PASSWORD).await.unwrap().secret;
    for kind in Kind::ALL {
        for record in bench.registry.list_everywhere(kind, &Page::first(100)).await.unwrap() {
            let text = record.body.to_string();
            for secret in [&secret, &session, PASSWORD] {
                assert!(!text.contains(secret), "{kind:?} holds a secret");
            }
            assert!(!text.contains("\"password_hash\"") || text.contains("$argon2id$"), "{text}");
        }
    }
}

/// One that cannot be read ends, and the start does not: the others go on.
#[tokio::test]
async fn an_unreadable_session_is_dropped_at_the_start() {
    let bench = bench();
    let root = bench.root().await;
    let ada = bench.ada(&root).await;
    let secret = bench.sign_in(PASSWORD).await.unwrap().secret;
    let id = uuid::Uuid::from_u128(7);
    let body = serde_json::json!({"id": id, "user": ada.id, "purpose": "session"});
    let draft = Draft { kind: Kind::Session, id, unique: Default::default(), body };
    bench.registry.create(root.account, draft, &root.actor).await.unwrap();
    bench.sign_in(PASSWORD).await.unwrap();
    bench.auth.bootstrap(None).await.unwrap();
    assert!(bench.registry.get(root.account, Kind::Session, id).await.unwrap().is_none());
    bench.auth.session(&secret, peer()).await.unwrap();
}

#[tokio::test]
async fn a_link_works_once_and_not_for_long() {
    let bench = bench();
    let root = bench.root().await;
    let ada = bench.ada(&root).await;
    let link =
        || async { bench.auth.create_link(root.account, ada.id, &root.actor).await.unwrap() };
    let once = link().await;
    unauthenticated(bench.auth.token(&once, peer()).await);
    unauthenticated(bench.auth.session(&once, peer()).await);
    bench.auth.redeem_link(&once, peer()).await.unwrap();
    unauthenticated(bench.auth.redeem_link(&once, peer()).await);

    let contended = link().await;
    let (a, b) = tokio::join!(
        bench.auth.redeem_link(&contended, peer()),
        bench.auth.redeem_link(&contended, peer())
    );
    assert_eq!(usize::from(a.is_ok()) + usize::from(b.is_ok()), 1, "of two at once, one gets in");

    let late = link().await;
    bench.clock.advance_micros(LINK_AGE_MICROS_MAX);
    unauthenticated(bench.auth.redeem_link(&late, peer()).await);
}

#[tokio::test]
async fn a_session_lasts_while_it_is_used() {
    let bench = bench();
    let root = bench.root().await;
    bench.ada(&root).await;
    let secret = bench.sign_in(PASSWORD).await.unwrap().secret;
    for _ in 0..5 {
        bench.clock.advance_micros(SESSION_IDLE_MICROS - 1_000_000);
        bench.auth.session(&secret, peer()).await.unwrap();
    }
    bench.clock.advance_micros(SESSION_IDLE_MICROS - 1_000_000);
    bench.auth.session(&secret, peer()).await.unwrap();
    // 180 days after its begin it ends, used or not.
    bench.clock.advance_micros(10_000_000);
    unauthenticated(bench.auth.session(&secret, peer()).await);

    let idle = bench.sign_in(PASSWORD).await.unwrap().secret;
    bench.clock.advance_micros(SESSION_IDLE_MICROS);
    unauthenticated(bench.auth.session(&idle, peer()).await);
}

#[tokio::test]
async fn signing_out_and_a_new_password_end_sessions() {
    let bench = bench();
    let root = bench.root().await;
    bench.ada(&root).await;
    let [a, b, c] = [(); 3].map(|()| bench.sign_in(PASSWORD));
    let (a, b, c) = (a.await.unwrap(), b.await.unwrap(), c.await.unwrap());
    bench.auth.sign_out(&a.identity).await.unwrap();
    unauthenticated(bench.auth.session(&a.secret, peer()).await);

    let wrong = bench
        .auth
        .set_password(&b.identity, Some("wrong".to_owned()), "another long one".to_owned())
        .await;
    assert!(matches!(wrong, Err(AuthError::Refused(_))), "{wrong:?}");
    let none = bench.auth.set_password(&b.identity, None, "another long one".to_owned()).await;
    assert!(matches!(none, Err(AuthError::Refused(_))), "{none:?}");
    bench
        .auth
        .set_password(&b.identity, Some(PASSWORD.to_owned()), "another long one".to_owned())
        .await
        .unwrap();
    bench.auth.session(&b.secret, peer()).await.unwrap();
    eventually("the other session has ended", async || {
        bench.auth.session(&c.secret, peer()).await.is_err()
    })
    .await;
    unauthenticated(bench.sign_in(PASSWORD).await);
    bench.sign_in("another long one").await.unwrap();
}

#[tokio::test]
async fn weak_passwords_are_refused_with_the_reason() {
    let bench = bench();
    let root = bench.root().await;
    for (password, reason) in [
        ("short", "10 to 256"),
        ("aaaaaaaaaaaa", "five different"),
        ("grace-is-my-name", "user's name"),
        (&"x1y2z".repeat(60), "10 to 256"),
    ] {
        let new = NewUser {
            name: "grace".to_owned(),
            scopes: vec![Scope::Read],
            password: Some(password.to_owned()),
        };
        match bench.auth.create_user(&root, root.account, new).await {
            Err(AuthError::Refused(text)) => assert!(text.contains(reason), "{text}"),
            other => panic!("{password} was not refused: {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_user_has_a_bounded_number_of_sessions() {
    let bench = bench();
    let root = bench.root().await;
    bench.ada(&root).await;
    let mut secrets = Vec::new();
    for _ in 0..SESSIONS_MAX + 3 {
        bench.clock.advance_micros(1_000_000);
        secrets.push(bench.sign_in(PASSWORD).await.unwrap().secret);
    }
    let left = bench.registry.list(root.account, Kind::Session, &Page::first(100)).await.unwrap();
    // One link of the first start is among them.
    assert!(left.len() <= SESSIONS_MAX + 1, "{}", left.len());
    unauthenticated(bench.auth.session(&secrets[0], peer()).await);
    bench.auth.session(secrets.last().unwrap(), peer()).await.unwrap();
}

#[tokio::test]
async fn failures_make_the_next_attempt_wait() {
    let bench = bench();
    let root = bench.root().await;
    bench.ada(&root).await;
    let mut waited = None;
    for _ in 0..8 {
        match bench.sign_in("wrong password").await {
            Err(AuthError::TooMany { retry_after_s }) => waited = Some(retry_after_s),
            other => drop(unauthenticated(other)),
        }
    }
    assert!(waited.is_some_and(|s| (1..=3).contains(&s)), "{waited:?}");
    // Even the right password waits: an attacker learns nothing from being refused.
    let right = bench.sign_in(PASSWORD).await;
    assert!(matches!(right, Err(AuthError::TooMany { .. })));
    // By now the address has failed too often, whatever the name.
    for name in ["bob", "carol", "dave", "eve", "frank", "gina"] {
        drop(bench.auth.sign_in(name, "wrong password", peer()).await);
    }
    let other_name = bench.auth.sign_in("heidi", "wrong password", peer()).await;
    assert!(matches!(other_name, Err(AuthError::TooMany { .. })));
    let elsewhere =
        bench.auth.sign_in("heidi", "wrong password", "198.51.100.1".parse().unwrap()).await;
    unauthenticated(elsewhere);
}

/// Who keeps trying a name from elsewhere keeps nobody out.
#[tokio::test]
async fn failures_elsewhere_keep_nobody_out() {
    let bench = bench();
    let root = bench.root().await;
    bench.ada(&root).await;
    let from = |peer: &str, password: &'static str| {
        let peer: IpAddr = peer.parse().unwrap();
        let auth = bench.auth.clone();
        async move { auth.sign_in("ada", password, peer).await }
    };
    for _ in 0..40 {
        drop(from("198.51.100.1", "wrong password").await);
    }
    assert!(matches!(from("198.51.100.1", PASSWORD).await, Err(AuthError::TooMany { .. })));
    bench.sign_in(PASSWORD).await.unwrap();
    // Nor from many addresses at once: each has one try then, and waits.
    for n in 0..60 {
        unauthenticated(from(&format!("2001:db8:0:{n:x}::1"), "wrong password").await);
    }
    bench.sign_in(PASSWORD).await.unwrap();
    unauthenticated(from("2001:db8:1::1", "wrong password").await);
    match from("2001:db8:1::2", PASSWORD).await {
        Err(AuthError::TooMany { retry_after_s }) => assert!(retry_after_s > 20),
        other => panic!("one host's network is one address, {:?}", other.err()),
    }
    bench.sign_in(PASSWORD).await.unwrap();
}

#[tokio::test]
async fn unknown_tokens_back_off_but_known_ones_pass() {
    let bench = bench();
    let secret = bench.start().await.token.unwrap();
    bench.auth.token(&secret, peer()).await.unwrap();
    let mut refused = 0;
    for n in 0..60 {
        let wrong = format!("flt_{n:040}");
        refused += usize::from(matches!(
            bench.auth.token(&wrong, peer()).await,
            Err(AuthError::TooMany { .. })
        ));
    }
    assert!(refused >= 20, "{refused}");
    bench.auth.token(&secret, peer()).await.unwrap();
}

#[tokio::test]
async fn tokens_are_bound_to_their_networks_time_and_devices() {
    let bench = bench();
    let root = bench.root().await;
    let device = DeviceId::from_bytes([9; 16]);
    let new = NewToken {
        name: "gate".to_owned(),
        scopes: vec![Scope::Command],
        devices: vec![device],
        networks: vec!["10.0.0.0/8".to_owned(), "2001:db8::/32".to_owned()],
        expires_at: Some(Timestamp::from_seconds(1_800_000_100)),
    };
    let (token, secret) = bench.auth.create_token(&root, root.account, new).await.unwrap();
    assert!(secret.starts_with(&token.object.prefix));
    assert_eq!(token.object.created_by, root.actor.name);
    let at = |peer: &str| bench.auth.token(&secret, peer.parse().unwrap());
    let identity = at("10.3.4.5").await.unwrap();
    at("2001:db8::9").await.unwrap();
    assert!(unauthenticated(bench.auth.token(&secret, peer()).await).contains("address"));
    assert!(
        identity.may(Scope::Command) && identity.may(Scope::Read) && !identity.may(Scope::Write)
    );
    assert!(identity.may_see(device) && !identity.may_see(DeviceId::from_bytes([8; 16])));
    bench.clock.advance_micros(100_000_000);
    assert!(unauthenticated(at("10.3.4.5").await).contains("expired"));
    assert!(bench.auth.recheck(&identity).await.is_err());
}

#[tokio::test]
async fn nobody_hands_out_more_than_he_has() {
    let bench = bench();
    let root = bench.root().await;
    let device = DeviceId::from_bytes([9; 16]);
    let limited = Identity { scopes: vec![Scope::Admin], devices: vec![device], ..root.clone() };
    let make = |by: Identity, scopes: Vec<Scope>, devices: Vec<DeviceId>, networks: Vec<String>| {
        let auth = bench.auth.clone();
        async move {
            let new =
                NewToken { name: "t".to_owned(), scopes, devices, networks, expires_at: None };
            auth.create_token(&by, by.account, new).await
        }
    };
    let refused = [
        make(limited.clone(), vec![Scope::Root], vec![device], vec![]).await,
        make(limited.clone(), vec![Scope::Read], vec![], vec![]).await,
        make(limited.clone(), vec![Scope::Read], vec![DeviceId::from_bytes([8; 16])], vec![]).await,
        make(root.clone(), vec![], vec![], vec![]).await,
        make(root.clone(), vec![Scope::Read], vec![], vec!["10.0.0.0/40".to_owned()]).await,
    ];
    for result in refused {
        assert!(matches!(result, Err(AuthError::Refused(_))), "{:?}", result.map(|t| t.0));
    }
    make(limited, vec![Scope::Admin, Scope::Write], vec![device], vec![]).await.unwrap();
}

#[tokio::test]
async fn a_revoked_token_stops_at_once() {
    let bench = bench();
    let root = bench.root().await;
    let new = NewToken { name: "t".to_owned(), scopes: vec![Scope::Read], ..NewToken::default() };
    let (token, secret) = bench.auth.create_token(&root, root.account, new).await.unwrap();
    let identity = bench.auth.token(&secret, peer()).await.unwrap();
    let mut changes = bench.auth.changes();
    let id = token.object.id.0;
    bench.registry.delete(root.account, Kind::Token, id, None, &root.actor).await.unwrap();
    unauthenticated(bench.auth.token(&secret, peer()).await);
    tokio::time::timeout(Duration::from_secs(2), changes.changed()).await.unwrap().unwrap();
    assert!(bench.auth.recheck(&identity).await.is_err());
}

#[tokio::test]
async fn changed_rights_and_disabled_owners_take_effect() {
    let bench = bench();
    let root = bench.root().await;
    let ada = bench.ada(&root).await;
    let signed_in = bench.sign_in(PASSWORD).await.unwrap();
    let new = NewToken { name: "t".to_owned(), scopes: vec![Scope::Read], ..NewToken::default() };
    let (token, secret) = bench.auth.create_token(&root, root.account, new).await.unwrap();
    bench.auth.token(&secret, peer()).await.unwrap();

    let wider = Token { scopes: vec![Scope::Write], ..token.object.clone() };
    bench.registry.update_object(root.account, &wider, None, &root.actor).await.unwrap();
    eventually("the new scope is there", async || {
        bench.auth.token(&secret, peer()).await.unwrap().may(Scope::Write)
    })
    .await;

    let disabled = User { enabled: false, ..ada };
    bench.registry.update_object(root.account, &disabled, None, &root.actor).await.unwrap();
    eventually("the session has ended", async || {
        bench.auth.session(&signed_in.secret, peer()).await.is_err()
    })
    .await;
    assert!(bench.auth.recheck(&signed_in.identity).await.is_err());
    unauthenticated(bench.sign_in(PASSWORD).await);

    let account =
        bench.registry.get_object::<Account>(root.account, root.account.0).await.unwrap().unwrap();
    let closed = Account { enabled: false, ..account.object };
    bench
        .registry
        .update_object(root.account, &closed, None, &Actor::system("test"))
        .await
        .unwrap();
    eventually("no token of the account works", async || {
        bench.auth.token(&secret, peer()).await.is_err()
    })
    .await;
    assert!(bench.auth.recheck(&root).await.is_err());
}

/// Connections that last ask again when something changed: what was narrowed must reach them.
#[tokio::test]
async fn a_narrowed_token_reaches_those_who_are_in() {
    let bench = bench();
    let root = bench.root().await;
    let new = NewToken { name: "t".to_owned(), scopes: vec![Scope::Read], ..NewToken::default() };
    let (token, secret) = bench.auth.create_token(&root, root.account, new).await.unwrap();
    let identity = bench.auth.token(&secret, peer()).await.unwrap();
    bench.auth.recheck(&identity).await.unwrap();
    let change = async |changed: Token| {
        bench.registry.update_object(root.account, &changed, None, &root.actor).await.unwrap();
    };
    let here = Token { networks: vec![peer().to_string()], ..token.object.clone() };
    change(here).await;
    bench.auth.recheck(&identity).await.unwrap();
    change(Token { networks: vec!["10.99.0.0/16".to_owned()], ..token.object.clone() }).await;
    assert!(unauthenticated(bench.auth.recheck(&identity).await).contains("address"));
    let soon = Timestamp::from_seconds(1_900_000_000);
    change(Token { expires_at: Some(soon), ..token.object.clone() }).await;
    assert!(unauthenticated(bench.auth.recheck(&identity).await).contains("expiry"));
}

#[tokio::test]
async fn who_came_by_a_link_replaces_a_forgotten_password_once() {
    let bench = bench();
    let root = bench.root().await;
    let ada = bench.ada(&root).await;
    let link = bench.auth.create_link(root.account, ada.id, &root.actor).await.unwrap();
    let by_link = bench.auth.redeem_link(&link, peer()).await.unwrap();
    let needs = bench.auth.needs_current_password(&by_link.identity, &by_link.user);
    assert!(!needs.await.unwrap());
    let set = |new: &str| bench.auth.set_password(&by_link.identity, None, new.to_owned());
    set("a new and long one").await.unwrap();
    let again = set("yet another long one").await;
    assert!(matches!(again, Err(AuthError::Refused(_))), "{again:?}");
    let signed_in = bench.sign_in("a new and long one").await.unwrap();
    let needs = bench.auth.needs_current_password(&signed_in.identity, &signed_in.user);
    assert!(needs.await.unwrap());
}

/// Hashing is slow by design: it must not hold up the event loop, and only so many may wait.
#[tokio::test]
async fn many_sign_ins_at_once_are_bounded() {
    let bench = bench();
    let root = bench.root().await;
    bench.ada(&root).await;
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..60_u8 {
        let auth = bench.auth.clone();
        // Each from a network of its own, and by a name of its own.
        let peer = IpAddr::from([198, 51, 100, n]);
        tasks.spawn(async move {
            auth.sign_in(&format!("user{n}"), "wrong password", peer).await.err()
        });
    }
    let results = tasks.join_all().await;
    let busy = results.iter().filter(|r| matches!(r, Some(AuthError::TooMany { .. }))).count();
    assert!((20..60).contains(&busy), "{busy} of 60 were told to come back");
}

/// Who may read is told of devices, not of what administrators do.
#[tokio::test]
async fn what_people_change_is_for_administrators() {
    let bench = bench();
    let root = bench.root().await;
    let reader = Identity { scopes: vec![Scope::Read], ..root.clone() };
    let event = |kind| Event {
        id: EventId::from_bytes([1; 16]),
        account: root.account,
        kind,
        object: uuid::Uuid::from_bytes([2; 16]),
        timestamp: Timestamp::from_seconds(0),
        params: Params::new(),
    };
    assert!(root.may_hear(&event(EventKind::Audit)));
    assert!(!reader.may_hear(&event(EventKind::Audit)));
    assert!(reader.may_hear(&event(EventKind::Online)));
    let other = Identity { devices: vec![DeviceId::from_bytes([3; 16])], ..root };
    assert!(!other.may_hear(&event(EventKind::Online)));
}
