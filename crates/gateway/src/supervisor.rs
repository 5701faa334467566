//! Keeps the listeners as the registry wants them.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::registry::{RegistryExt, typed};
use fieldline_contracts::{Kind, Page, Registry, RegistryError};
use fieldline_model::{AccountId, Channel, ChannelId, CloseCode, DeviceId, Transport};
use fieldline_runtime::tls::{ReloadingTls, TlsFiles};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::channel::ChannelLive;
use crate::elsewhere::Elsewhere;
use crate::event_loop::EventLoops;
use crate::journal::{self, Line};
use crate::listen;
use crate::programs::ProgramError;
use crate::shared::{Entry, Shared};

/// Wait before the registry is asked again after it failed.
const RETRY_DELAY: Duration = Duration::from_millis(500);
/// Changes of the registry read in one go.
const CHANGES_MAX: usize = 1_000;
/// Time that event loops have to let go of a listener.
const CLOSE_WAIT: Duration = Duration::from_secs(5);

pub(crate) struct Supervisor {
    pub(crate) shared: Arc<Shared>,
    pub(crate) loops: EventLoops,
    pub(crate) ready: watch::Sender<bool>,
    pub(crate) elsewhere: Elsewhere,
}

impl Supervisor {
    fn registry(&self) -> Arc<dyn Registry> {
        Arc::clone(&self.shared.platform().registry)
    }

    /// Follows the registry until `shutdown`.
    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = self.follow() => {}
        }
    }

    async fn follow(&self) {
        let registry = self.registry();
        let mut newest = registry.watch();
        let mut seen = *newest.borrow_and_update();
        while let Err(error) = self.load().await {
            warn!(%error, "channels cannot be read yet, trying again");
            tokio::time::sleep(RETRY_DELAY).await;
        }
        self.elsewhere.follow();
        self.ready.send_replace(true);
        loop {
            if let Err(error) = self.catch_up(&mut seen).await {
                warn!(%error, "changes of the registry cannot be read, trying again");
                tokio::time::sleep(RETRY_DELAY).await;
                continue;
            }
            self.elsewhere.follow();
            tokio::select! {
                changed = newest.changed() => {
                    if changed.is_err() {
                        // The registry is gone: what listens goes on.
                        std::future::pending::<()>().await;
                    }
                }
                () = tokio::time::sleep(self.shared.config.listen_retry_delay) => {
                    self.retry().await;
                }
            }
        }
    }

    async fn load(&self) -> Result<(), RegistryError> {
        let mut page = Page::first(Page::LIMIT_MAX);
        loop {
            let records = self.registry().list_everywhere(Kind::Channel, &page).await?;
            page.after = records.last().map(|record| record.id);
            let complete = records.len() < page.limit;
            for record in records {
                let id = record.id;
                match typed::<Channel>(record) {
                    Ok(channel) => self.want(channel.object).await,
                    // One that cannot be read must not keep the others from listening.
                    Err(error) => warn!(%error, channel = %id, "the channel is left out"),
                }
            }
            if complete {
                return Ok(());
            }
        }
    }

    async fn catch_up(&self, seen: &mut u64) -> Result<(), RegistryError> {
        loop {
            let changes = self.registry().changes(*seen, CHANGES_MAX).await?;
            let Some(last) = changes.last() else { return Ok(()) };
            let last = last.sequence;
            let mut channels = HashSet::new();
            let mut accounts = HashSet::new();
            for change in changes {
                match change.kind {
                    Kind::Channel => {
                        channels.insert((change.account, ChannelId(change.object)));
                    }
                    Kind::Protocol | Kind::Account => {
                        accounts.insert(change.account);
                    }
                    Kind::Device => {
                        let device = DeviceId(change.object);
                        let directory = &self.shared.directory;
                        if let Some(holder) = directory.holder(change.account, device) {
                            holder.refresh();
                        }
                    }
                    _ => {}
                }
            }
            for (account, id) in self.channels_of(&accounts) {
                channels.insert((account, id));
            }
            for (account, id) in channels {
                self.reconsider(account, id).await?;
            }
            *seen = last;
        }
    }

    fn channels_of(&self, accounts: &HashSet<AccountId>) -> Vec<(AccountId, ChannelId)> {
        let channels = self.shared.channels.read();
        let of = channels.iter().filter(|(_, entry)| accounts.contains(&entry.account));
        of.map(|(id, entry)| (entry.account, *id)).collect()
    }

    /// Tries again what could not listen.
    async fn retry(&self) {
        let failed: Vec<(AccountId, ChannelId)> = {
            let channels = self.shared.channels.read();
            let failed = channels.iter().filter(|(_, entry)| entry.error.is_some());
            failed.map(|(id, entry)| (entry.account, *id)).collect()
        };
        for (account, id) in failed {
            if let Err(error) = self.reconsider(account, id).await {
                warn!(%error, channel = %id, "the channel cannot be read");
            }
        }
    }

    /// Reads a channel again and does what it wants.
    async fn reconsider(&self, account: AccountId, id: ChannelId) -> Result<(), RegistryError> {
        match self.registry().get_object::<Channel>(account, id.0).await {
            Ok(Some(channel)) => self.want(channel.object).await,
            Ok(None) => {
                if let Some(live) = self.take_live(id) {
                    self.close(&live, CloseCode::ChannelChanged).await;
                }
                self.shared.channels.write().remove(&id);
            }
            Err(error @ RegistryError::Corrupt { .. }) => {
                warn!(%error, channel = %id, "the channel stays as it was");
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn live(&self, id: ChannelId) -> Option<Arc<ChannelLive>> {
        self.shared.channels.read().get(&id).and_then(|entry| entry.live.clone())
    }

    pub(crate) fn take_live(&self, id: ChannelId) -> Option<Arc<ChannelLive>> {
        self.shared.channels.write().get_mut(&id).and_then(|entry| entry.live.take())
    }

    fn note(&self, channel: &Channel, live: Option<Arc<ChannelLive>>, error: Option<String>) {
        let (account, enabled) = (channel.account, channel.enabled);
        let before = self.shared.channels.read().get(&channel.id).and_then(|e| e.error.clone());
        if let Some(error) = &error
            && before.as_ref() != Some(error)
        {
            warn!(%error, channel = %channel.name, id = %channel.id, "the channel is in trouble");
            let line = Line::new("error").text(error).of_settings(channel, self.shared.now());
            self.shared.ingest.log_with(256, move || line);
        }
        let entry = Entry { account, enabled, live, error };
        self.shared.channels.write().insert(channel.id, entry);
    }

    /// Brings what listens in line with `channel`, without touching others.
    async fn want(&self, channel: Channel) {
        let channel = Arc::new(channel);
        let enabled = channel.enabled && self.account_enabled(channel.account).await;
        let mut live = self.live(channel.id);
        if let Some(running) = &live
            && (!enabled || needs_reopening(&running.settings(), &channel))
        {
            self.take_live(channel.id);
            self.close(running, CloseCode::ChannelChanged).await;
            live = None;
        }
        if !enabled {
            self.note(&channel, None, None);
            return;
        }
        let (registry, programs) = (self.registry(), &self.shared.programs);
        let program = programs.get(&*registry, channel.account, &channel.protocol).await;
        let program = program.map_err(|error| {
            // The tenant's channel gets fixed words for what is the operator's.
            if let ProgramError::Registry(error) = &error {
                warn!(%error, channel = %channel.id, "a channel's protocol cannot be read");
            }
            error.to_string()
        });
        let program = program.and_then(|program| fits(&program, &channel).map(|()| program));
        match (live, program) {
            (Some(live), Ok(program)) => {
                live.set_settings(Arc::clone(&channel));
                let version =
                    format!("protocol {} is in force for new connections", channel.protocol);
                if live.set_program(program) {
                    self.log(&live, Line::new("compile").text(&version));
                }
                self.note(&channel, Some(live), None);
            }
            // Devices go on with the program that works.
            (Some(live), Err(error)) => {
                live.set_settings(Arc::clone(&channel));
                self.note(&channel, Some(live), Some(error));
            }
            (None, Ok(program)) => {
                let opened = self.open(&channel, program).await;
                match opened {
                    Ok(live) => self.note(&channel, Some(live), None),
                    Err(error) => self.note(&channel, None, Some(error.to_string())),
                }
            }
            (None, Err(error)) => self.note(&channel, None, Some(error)),
        }
    }

    /// Whether the account is let in. Read here, not from the pipeline's cache,
    /// which may see the same change a little later.
    async fn account_enabled(&self, account: AccountId) -> bool {
        let known =
            self.registry().get_object::<fieldline_model::Account>(account, account.0).await;
        !matches!(known, Ok(Some(account)) if !account.object.enabled)
    }

    async fn open(
        &self,
        channel: &Arc<Channel>,
        program: Arc<fieldline_pvm::Program>,
    ) -> std::io::Result<Arc<ChannelLive>> {
        let tls = if channel.transport == Transport::Tls { Some(tls(channel)?) } else { None };
        let udp = channel.transport == Transport::Udp;
        let (address, listeners) = listen::open(
            &channel.listen,
            self.shared.config.listen_address,
            udp,
            self.loops.count(),
        )?;
        let live = Arc::new(ChannelLive::new(Arc::clone(channel), program, tls, address));
        self.loops.open(&live, listeners).await;
        info!(channel = %channel.name, %address, protocol = %channel.protocol, "listening");
        self.log(&live, Line::new("started").text(&address.to_string()).channel(&live));
        Ok(live)
    }

    /// Closes a channel's listeners, then asks its connections to end.
    async fn close(&self, live: &Arc<ChannelLive>, code: CloseCode) {
        self.stop_listening(live, code).await;
        live.close_all(code);
    }

    /// Closes a channel's listeners.
    pub(crate) async fn stop_listening(&self, live: &Arc<ChannelLive>, code: CloseCode) {
        live.stop.cancel();
        live.listening.close();
        if timeout(CLOSE_WAIT, live.listening.wait()).await.is_err() {
            warn!(channel = %live.id, "an event loop holds on to a listener");
        }
        info!(channel = %live.settings().name, address = %live.address, code = code.name(), "stopped listening");
        self.log(live, Line::new("stopped").close(code));
    }

    fn log(&self, live: &ChannelLive, line: Line) {
        let clock = &self.shared.platform().clock;
        journal::log_channel(&self.shared.ingest, &**clock, live, line);
    }
}

/// Whether a change of settings means another listener or another protocol.
fn needs_reopening(old: &Channel, new: &Channel) -> bool {
    // Exhaustive on purpose: a new setting does not compile until judged here.
    let Channel {
        id: _,
        account: _,
        name: _,
        protocol,
        transport,
        listen,
        enabled: _,
        auto_register: _,
        idle_timeout_s: _,
        connections_max: _,
        frame_bytes_max: _,
        connection_bytes_per_s_max: _,
        tls_certificate,
        tls_key,
        labels: _,
        created_at: _,
    } = old;
    *protocol != new.protocol
        || *transport != new.transport
        || *listen != new.listen
        || *tls_certificate != new.tls_certificate
        || *tls_key != new.tls_key
}

/// Whether a program can run over the channel's transport.
fn fits(program: &fieldline_pvm::Program, channel: &Channel) -> Result<(), String> {
    let udp = channel.transport == Transport::Udp;
    let transports = program.transports();
    if transports.iter().any(|transport| (*transport == Transport::Udp) == udp) {
        return Ok(());
    }
    let over = if udp { "udp" } else { "tcp" };
    Err(format!("protocol `{}` does not run over {over}", channel.protocol))
}

fn tls(channel: &Channel) -> std::io::Result<ReloadingTls> {
    let (Some(certificate), Some(key)) = (&channel.tls_certificate, &channel.tls_key) else {
        let text = "a TLS channel needs tls_certificate and tls_key";
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, text));
    };
    let files = TlsFiles { certificate: PathBuf::from(certificate), key: PathBuf::from(key) };
    Ok(ReloadingTls::load(files, &[])?)
}
