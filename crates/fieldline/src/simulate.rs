//! `fieldline simulate`: devices that are played.

use std::io::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fieldline_contracts::SystemClock;
use fieldline_testkit::fleet::{Fleet, Protocol};
use fieldline_testkit::stats::{AckJournal, Stats};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::cli::{Output, SimulateCommand, TransportArg};
use crate::protocol::print;

/// How often a line about progress is printed.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// Plays devices until a signal or the end of the duration asked for.
pub(crate) async fn run(command: SimulateCommand) -> Result<(), String> {
    let SimulateCommand::Trackers {
        protocol,
        devices,
        rate,
        target,
        transport,
        seed,
        duration,
        journal,
        output,
    } = command;
    if !rate.is_finite() || rate < 0.0 {
        return Err(format!(
            "a rate of {rate} cannot be: give messages a second, or 0 for as fast as is acknowledged"
        ));
    }
    let protocol = Protocol::parse(&protocol)?;
    let mut fleet = Fleet::new(protocol, devices, rate, target.clone(), Arc::new(SystemClock));
    fleet.udp = matches!(transport, TransportArg::Udp);
    fleet.seed = seed;
    if let Some(path) = journal {
        let opened =
            AckJournal::open(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        fleet.journal = Some(Arc::new(opened));
    }
    let (stop, stats, began) =
        (CancellationToken::new(), Arc::new(Stats::default()), Instant::now());
    let signals = tokio::spawn(fieldline_runtime::shutdown::on_signals(stop.clone()));
    let timer = stop.clone();
    tokio::spawn(async move {
        if let Some(seconds) = duration {
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            timer.cancel();
        }
    });
    let progress = Arc::clone(&stats);
    let reporter = tokio::spawn(async move {
        loop {
            tokio::time::sleep(PROGRESS_EVERY).await;
            // Nothing can be done about a closed terminal.
            let _closed = writeln!(std::io::stderr(), "{}", progress.summary());
        }
    });
    fleet.run(stop, Arc::clone(&stats)).await;
    reporter.abort();
    signals.abort();
    print(&match output {
        Output::Table => stats.summary(),
        Output::Json => summary(&stats, began.elapsed()).to_string(),
    })?;
    if Stats::get(&stats.acked) == 0 && devices > 0 {
        return Err(format!(
            "nothing was acknowledged: is {target} a channel of this protocol that lets these devices in?"
        ));
    }
    Ok(())
}

fn summary(stats: &Stats, elapsed: Duration) -> serde_json::Value {
    let ms = |part: f64| stats.latency.quantile(part).as_secs_f64() * 1_000.0;
    json!({
        "seconds": elapsed.as_secs_f64(),
        "sent": Stats::get(&stats.sent),
        "acked": Stats::get(&stats.acked),
        "resent": Stats::get(&stats.resent),
        "failures": Stats::get(&stats.failures),
        "commands": Stats::get(&stats.commands),
        "latency_ms": { "p50": ms(0.5), "p99": ms(0.99) },
    })
}
