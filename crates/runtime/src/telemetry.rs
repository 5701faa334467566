//! Logs and metrics of a process.

use std::sync::Arc;
use std::time::Duration;

use metrics_exporter_prometheus::{BuildError, PrometheusBuilder};
use serde::Deserialize;
use tracing_subscriber::EnvFilter;

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// `[log]`: logs.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// For people or machines.
    pub format: LogFormat,
    /// Filter such as `info` or `fieldline_gateway=debug,info`. The environment's `RUST_LOG` comes before it.
    pub filter: String,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { format: LogFormat::Text, filter: "info".to_owned() }
    }
}

impl LogConfig {
    /// Checks a filter.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn check_filter(filter: &str) -> Result<(), String> {
        match filter.parse::<EnvFilter>() {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("log.filter `{filter}` is wrong: {error}")),
        }
    }
}

/// Sends log lines to standard error. Later calls have no effect.
pub fn init_logs(config: &LogConfig) {
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(&config.filter));
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let installed = match config.format {
        LogFormat::Text => {
            lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).try_init()
        }
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
    if let Err(error) = installed {
        tracing::debug!(%error, "logs were set up before");
    }
}

/// Renders all metrics in Prometheus' text format.
pub type MetricsPage = Arc<dyn Fn() -> String + Send + Sync>;

/// Installs the process' metrics recorder and keeps it tidy from a thread of its own.
///
/// # Errors
///
/// If a recorder is installed already.
pub fn init_metrics() -> Result<MetricsPage, BuildError> {
    let seconds = [
        0.000_1, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
        10.0,
    ];
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(
            metrics_exporter_prometheus::Matcher::Suffix("_seconds".to_owned()),
            &seconds,
        )?
        .install_recorder()?;
    let upkeep = handle.clone();
    std::thread::Builder::new()
        .name("metrics".to_owned())
        .spawn(move || {
            loop {
                std::thread::sleep(Duration::from_secs(5));
                upkeep.run_upkeep();
                metrics::gauge!("process_resident_bytes").set(resident_bytes());
            }
        })
        .ok();
    Ok(Arc::new(move || handle.render()))
}

/// Bytes of memory that the process holds; 0 where the system does not tell.
#[must_use]
#[allow(clippy::cast_precision_loss, reason = "a gauge is a float")]
pub fn resident_bytes() -> f64 {
    let Ok(text) = std::fs::read_to_string("/proc/self/statm") else { return 0.0 };
    let pages = text.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok());
    // Every supported system has pages of 4 KiB.
    pages.map_or(0.0, |pages| (pages * 4_096) as f64)
}
