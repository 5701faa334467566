//! Tells programs (`run.json`) and the person at the terminal where everything is.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use fieldline_auth::Bootstrap;
use fieldline_contracts::registry::typed;
use fieldline_contracts::{ChannelControl as _, Clock as _, Kind, Page, Platform, SystemClock};
use fieldline_gateway::Gateway;
use fieldline_model::{Channel, Transport};
use fieldline_runtime::DataDir;
use serde_json::json;

/// Most channels that the terminal is told of.
const CHANNELS_MAX: usize = 8;

/// What a start has come to.
pub(crate) struct Started {
    /// Whether the API is served by HTTPS.
    pub(crate) secure: bool,
    /// Where the API listens.
    pub(crate) http: Option<SocketAddr>,
    /// Where the broker listens, by `mqtt` and `mqtts`.
    pub(crate) mqtt: Vec<(&'static str, SocketAddr)>,
    /// What a first sign-in needs.
    pub(crate) bootstrap: Option<Bootstrap>,
    /// A line about each channel.
    pub(crate) channels: Vec<String>,
    /// Vehicles of the demo.
    pub(crate) demo_devices: Option<u32>,
    /// How long the start took.
    pub(crate) took: Duration,
}

/// A line about each channel: what it speaks and where, or why not.
pub(crate) async fn channels(platform: &Platform, gateway: &Gateway) -> Vec<String> {
    let page = Page::first(CHANNELS_MAX);
    let records = platform.registry.list_everywhere(Kind::Channel, &page).await.unwrap_or_default();
    let mut lines = Vec::new();
    for channel in
        records.into_iter().filter_map(|record| Some(typed::<Channel>(record).ok()?.object))
    {
        let status = gateway.status(channel.account, channel.id).await;
        let transport = match channel.transport {
            Transport::Tcp => "TCP",
            Transport::Tls => "TLS",
            Transport::Udp => "UDP",
        };
        let place = match (status.address, status.error) {
            (Some(address), _) => address,
            (None, Some(error)) => format!("NOT LISTENING: {error}"),
            (None, None) => "disabled".to_owned(),
        };
        lines.push(format!("{} over {transport}: {place}", channel.protocol));
    }
    lines
}

impl Started {
    /// Writes `run.json`, where there is a place for it, then says it at the terminal.
    pub(crate) fn announce(&self, data: Option<&DataDir>) -> std::io::Result<()> {
        if let Some(data) = data {
            self.write(data)?;
        }
        // A closed terminal is no reason to stop.
        let _closed = writeln!(std::io::stdout(), "{}", self.text(data));
        Ok(())
    }

    fn write(&self, data: &DataDir) -> std::io::Result<()> {
        let mut run = json!({
            "pid": std::process::id(),
            "version": env!("CARGO_PKG_VERSION"),
            "started_at": SystemClock.now(),
        });
        let http = self.http.map(|address| ("http", address));
        for (name, address) in http.iter().chain(&self.mqtt) {
            if let Some(members) = run.as_object_mut() {
                members.insert((*name).to_owned(), address.to_string().into());
            }
        }
        // Renamed into place: whoever waits for it never reads half of it.
        std::fs::write(data.join("run.json.new"), run.to_string())?;
        std::fs::rename(data.join("run.json.new"), data.join("run.json"))
    }

    fn text(&self, data: Option<&DataDir>) -> String {
        let scheme = if self.secure { "https" } else { "http" };
        // An address that stands for all is reached from here by name.
        let url = self.http.map_or_else(String::new, |http| {
            if http.ip().is_unspecified() {
                format!("{scheme}://localhost:{}", http.port())
            } else {
                format!("{scheme}://{http}")
            }
        });
        let (version, seconds) = (env!("CARGO_PKG_VERSION"), self.took.as_secs_f32());
        let mut text =
            format!("\nFieldline {version} is ready, {seconds:.2} s after its start\n\n");
        let mut line = |name: &str, value: &str| {
            // Writing to a String cannot fail.
            let _written = writeln!(text, "  {name:<10} {value}");
        };
        if self.http.is_some() {
            line("Console", &format!("{url}/"));
        }
        match &self.bootstrap {
            Some(Bootstrap { link_secret, token }) => {
                line("Sign in", &format!("{url}/#/sign-in?link={link_secret}"));
                line("", "works once, within 15 minutes; then set a password");
                if let Some(token) = token {
                    line("API token", token);
                    line("", "shown this once; keep it, or make others in the console");
                }
            }
            None if self.http.is_some() => {
                line("Sign in", "at the console, with your name and password");
            }
            None => {}
        }
        for (name, address) in &self.mqtt {
            line(if *name == "mqtt" { "MQTT" } else { "MQTT, TLS" }, &address.to_string());
        }
        for (at, channel) in self.channels.iter().enumerate() {
            line(if at == 0 { "Devices" } else { "" }, channel);
        }
        if let Some(devices) = self.demo_devices {
            line("Demo", &format!("{devices} simulated vehicles"));
        }
        if let Some(data) = data {
            line("Data", &data.path().display().to_string());
        }
        text
    }
}
