//! The server that runs, and the ports that one would take.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::finding::Finding;
use hyper::Method;
use serde_json::Value as Json;

use super::{Patient, data};
use crate::http_client::Client;

/// Longest that a connection on this machine may take.
const CONNECT_MAX: Duration = Duration::from_secs(2);

/// Where a server of this configuration answers on this machine; `None` where the system chooses the port.
pub(super) fn here(listen: SocketAddr) -> Option<SocketAddr> {
    let ip = match listen.ip() {
        ip if !ip.is_unspecified() => ip,
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
    };
    (listen.port() != 0).then(|| SocketAddr::new(ip, listen.port()))
}

/// Whether something answers at the API's address of the configuration.
pub(super) fn answers(patient: &Patient) -> bool {
    here(patient.config.http.listen)
        .is_some_and(|address| TcpStream::connect_timeout(&address, CONNECT_MAX).is_ok())
}

/// Whether the ports are free, where nothing of ours runs that may have them.
pub(super) fn ports(patient: &Patient) -> Vec<Finding> {
    let config = &patient.config;
    let runs = patient.data.as_deref().is_some_and(data::is_in_use)
        || config.node.is_some() && answers(patient);
    if runs {
        return Vec::new();
    }
    let all = [
        ("http.listen", Some(config.http.listen)),
        ("mqtt.listen", Some(config.mqtt.listen)),
        ("mqtt.listen_tls", config.mqtt.listen_tls),
        ("node.listen", config.node.as_ref().map(|node| node.listen)),
    ];
    let port = |(key, address): (&str, Option<SocketAddr>)| {
        let address = address?;
        let at = format!("{key} {address}");
        Some(match TcpListener::bind(address) {
            Ok(_) => Finding::ok("port", at, "it is free"),
            Err(error) => Finding::broken(
                "port",
                at,
                format!("it cannot be listened on: {error}"),
                "stop what uses it, or set another address",
            ),
        })
    };
    all.into_iter().filter_map(port).collect()
}

/// What the server says of itself: the one that was named, else the one that uses the data directory or the configuration.
pub(super) async fn server(patient: Arc<Patient>) -> Vec<Finding> {
    let secure = patient.config.http.tls_certificate.is_some();
    let url = |address: String| format!("{}://{address}", if secure { "https" } else { "http" });
    let named = patient.url.clone();
    let of_data = || {
        let data = patient.data.as_deref().filter(|data| data::is_in_use(data))?;
        let run = std::fs::read_to_string(data.join("run.json")).ok()?;
        let run: Json = serde_json::from_str(&run).ok()?;
        Some(url(run.get("http")?.as_str()?.to_owned()))
    };
    let of_node = || {
        let address = here(patient.config.http.listen)?;
        (patient.config.node.is_some() && answers(&patient)).then(|| url(address.to_string()))
    };
    let check = "server";
    let Some(url) = named.or_else(of_data).or_else(of_node) else {
        return vec![Finding::ok(check, "this machine", "none runs here")];
    };
    let asked = async {
        let client = Client::new(&url, None, patient.ca.as_deref())?;
        client.send(Method::GET, "/readyz", None).await
    };
    let answer = match asked.await {
        Ok(answer) => answer,
        Err(error) => {
            let remedy = "start it, or see its log; with a certificate of your own, give --ca";
            return vec![Finding::broken(check, url, error, remedy)];
        }
    };
    let body: Json = serde_json::from_slice(&answer.body).unwrap_or(Json::Null);
    let list = |name: &str| {
        let items = body.get(name).and_then(Json::as_array).map(Vec::as_slice).unwrap_or_default();
        items.iter().filter_map(Json::as_str).collect::<Vec<_>>().join("; ")
    };
    let (reasons, warnings) = (list("reasons"), list("warnings"));
    vec![if !answer.status.is_success() {
        Finding::broken(
            check,
            url,
            format!("it runs and is not ready: {reasons}"),
            "do what the reasons say",
        )
    } else if warnings.is_empty() {
        Finding::ok(check, url, "it is ready")
    } else {
        Finding::warning(
            check,
            url,
            format!("it is ready, and warns: {warnings}"),
            "do what the warnings say",
        )
    }]
}
