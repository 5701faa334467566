//! `fieldline doctor`: says in words what is wrong, and what to do about it.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::{Duration, Instant};

use hyper::Method;

use crate::cli::DoctorArgs;
use crate::config::Config;
use crate::http_client::Client;
use crate::protocol::print;

/// Less free space than this is a finding.
const FREE_BYTES_MIN: u64 = 1 << 30;
/// Fewer open files than this limit the devices that can connect.
const OPEN_FILES_MIN: u64 = 20_000;
/// A sync of the disk that takes longer than this limits how soon devices are acknowledged.
const SYNC_MAX: Duration = Duration::from_millis(50);
/// Syncs that are timed.
const SYNCS: u32 = 10;

/// What a look at one thing found.
enum Finding {
    /// As it should be.
    Good(String),
    /// Works, but not well.
    Weak(String),
    /// Does not work.
    Bad(String),
}

use Finding::{Bad, Good, Weak};

/// Looks at everything; fails if something does not work.
pub(crate) async fn run(args: DoctorArgs) -> Result<(), String> {
    let running = server(&args).await;
    let is_running = matches!(running, Good(_) | Weak(_));
    let mut findings = vec![("server", running)];
    match Config::load(args.config.as_deref()) {
        Ok(config) => {
            findings.push(("configuration", Good("can be used".to_owned())));
            for (name, address) in
                [("http port", config.http.listen), ("mqtt port", config.mqtt.listen)]
            {
                findings.push((name, port(address, is_running)));
            }
        }
        Err(error) => findings.push(("configuration", Bad(error.to_string()))),
    }
    findings.push(("data directory", data_lock(&args.data)));
    findings.push(("disk space", space(&args.data)));
    findings.push(("disk sync", sync_time(&args.data)));
    findings.push(("open files", open_files()));
    findings.push(("messages", messages(&args.data)));
    findings.push(("crashes", crashes(&args.data)));
    let bad = findings.iter().filter(|(_, finding)| matches!(finding, Bad(_))).count();
    for (name, finding) in &findings {
        let (mark, text) = match finding {
            Good(text) => ("ok  ", text),
            Weak(text) => ("WEAK", text),
            Bad(text) => ("BAD ", text),
        };
        print(&format!("{mark}  {name:<14}  {text}"))?;
    }
    if bad == 0 { Ok(()) } else { Err(format!("{bad} of {} checks failed", findings.len())) }
}

async fn server(args: &DoctorArgs) -> Finding {
    let client = match Client::new(&args.url, None, args.ca.as_deref()) {
        Ok(client) => client,
        Err(error) => return Bad(error),
    };
    match client.send(Method::GET, "/readyz", None).await {
        Ok(answer) if answer.status.is_success() => {
            let body = String::from_utf8_lossy(&answer.body).into_owned();
            if body.contains("\"warnings\":[]") {
                return Good(format!("{} is ready", args.url));
            }
            Weak(format!("{} is ready, with warnings: {}", args.url, body.trim()))
        }
        Ok(answer) => {
            let body = String::from_utf8_lossy(&answer.body).into_owned();
            Weak(format!("{} runs but is not ready: {} {}", args.url, answer.status, body.trim()))
        }
        Err(error) => Bad(error),
    }
}

fn port(address: SocketAddr, is_running: bool) -> Finding {
    match TcpListener::bind(address) {
        Ok(_) if is_running => Weak(format!(
            "nothing listens on {address}, though a server runs: it has another configuration"
        )),
        Ok(_) => Good(format!("{address} is free")),
        Err(_) if is_running => {
            Good(format!("{address} is in use, by the running server as it seems"))
        }
        Err(error) => Bad(format!(
            "cannot listen on {address}: {error}; stop what uses it or set another address"
        )),
    }
}

fn data_lock(data: &Path) -> Finding {
    let lock = match File::open(data.join("lock")) {
        Ok(lock) => lock,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Good(format!("`{}` is new: the first start creates it", data.display()));
        }
        Err(error) => {
            return Bad(format!("cannot open `{}`: {error}", data.join("lock").display()));
        }
    };
    match lock.try_lock_shared() {
        Ok(()) => Good(format!("`{}` is not in use", data.display())),
        Err(TryLockError::WouldBlock) => {
            Good(format!("`{}` is used by a running Fieldline", data.display()))
        }
        Err(TryLockError::Error(error)) => Bad(format!(
            "cannot lock `{}`: {error}; network file systems often cannot",
            data.display()
        )),
    }
}

/// The folder itself, or the nearest one above that is there.
fn existing(data: &Path) -> &Path {
    let absolute_or_here = |path: &'_ Path| path.as_os_str().is_empty();
    let found = data.ancestors().find(|path| path.is_dir());
    found.filter(|path| !absolute_or_here(path)).unwrap_or(Path::new("."))
}

fn space(data: &Path) -> Finding {
    match rustix::fs::statvfs(existing(data)) {
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            let text = format!("{} MiB free", free >> 20);
            if free < FREE_BYTES_MIN {
                Weak(format!(
                    "{text}; messages are refused when it is gone: set storage_bytes_max on accounts, or add space"
                ))
            } else {
                Good(text)
            }
        }
        Err(error) => Bad(format!("cannot be told: {error}")),
    }
}

/// Times syncs of a small file, as the log makes them.
fn sync_time(data: &Path) -> Finding {
    let path = existing(data).join(format!(".fieldline-doctor-{}", std::process::id()));
    let timed = || -> std::io::Result<Duration> {
        let mut file = OpenOptions::new().create_new(true).write(true).open(&path)?;
        let began = Instant::now();
        for _ in 0..SYNCS {
            file.write_all(&[0; 4_096])?;
            file.sync_data()?;
        }
        Ok(began.elapsed() / SYNCS)
    };
    let result = timed();
    let _gone_already = std::fs::remove_file(&path);
    match result {
        Ok(each) if each > SYNC_MAX => Weak(format!(
            "{each:.1?} a sync: devices wait at least that long for each acknowledgement"
        )),
        Ok(each) => Good(format!("{each:.1?} a sync")),
        Err(error) => Bad(format!("cannot write to `{}`: {error}", path.display())),
    }
}

fn open_files() -> Finding {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    match limit {
        Some(limit) if limit < OPEN_FILES_MIN => Weak(format!(
            "at most {limit}, so fewer devices than that can connect; raise it with `ulimit -n {OPEN_FILES_MIN}` or LimitNOFILE"
        )),
        Some(limit) => Good(format!("at most {limit}")),
        None => Good("no limit".to_owned()),
    }
}

/// What of the stored messages is damaged or lost.
fn messages(data: &Path) -> Finding {
    let found = fieldline_mdb::inspect(&data.join("messages"));
    if found.is_empty() {
        Good("logs and indexes are sound; messages are checked as they are read".to_owned())
    } else {
        Weak(found.join("; "))
    }
}

fn crashes(data: &Path) -> Finding {
    let reports = std::fs::read_dir(data.join("crash"))
        .map(|entries| entries.filter_map(|e| Some(e.ok()?.path())).collect::<Vec<_>>());
    match reports.unwrap_or_default().iter().max() {
        Some(newest) => {
            Weak(format!("the worker has died; the newest report is `{}`", newest.display()))
        }
        None => Good("none on record".to_owned()),
    }
}
