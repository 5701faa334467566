//! Ends this process where what it owns goes on after its lease: see [`Watchdog`].

use std::io::{self, Write as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fieldline_contracts::cluster::{self, GRACE};
use nix::sys::signal::{SigEvent, SigevNotify, Signal};
use nix::sys::time::TimeSpec;
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;
use parking_lot::{Condvar, Mutex};

/// When the process says why it ends and aborts, if it can: the kernel ends it soon after.
const ABORT_AFTER: Duration = Duration::from_millis(300);
const _: () = assert!(ABORT_AFTER.as_millis() < GRACE.as_millis());

/// What has no end within this has none.
const NEVER: Duration = Duration::from_secs(86_400);

/// A timer of the kernel that sends SIGKILL to this very process, set anew with each renewal of the lease.
///
/// The kernel needs nobody to be awake for that: it ends a process whose threads are stalled, one that was stopped by SIGSTOP, a
/// debugger or the freezer of its control group, and one that slept with the whole machine, before it runs another instruction. Where
/// the process is awake, a thread says why some moments before and aborts, for the crash report. What no process can have is a
/// watchdog for a whole machine that stands still unseen by its clock, as a virtual one does that is paused: there is the epoch of
/// its writes, and [`cluster::Lease::is_held`].
///
/// The kernel keeps such a signal from the first process of a container, number 1: that one has to be a master with this process as
/// its worker; see [`crate::supervise`].
pub struct Watchdog {
    timer: Mutex<OwnTimer>,
    shared: Arc<Shared>,
}

struct OwnTimer(Timer);

// SAFETY: what it holds is an id of the process, no address: any thread may set and delete the timer.
#[allow(unsafe_code, reason = "the library takes the id for a pointer; see above")]
unsafe impl Send for OwnTimer {}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Until when what is owned is held.
    until: Option<Instant>,
    stop: bool,
}

impl Watchdog {
    /// One that has nothing to watch yet.
    ///
    /// # Errors
    ///
    /// If the system refuses a timer or a thread.
    pub fn start() -> io::Result<Self> {
        let kill = SigevNotify::SigevSignal { signal: Signal::SIGKILL, si_value: 0 };
        // This clock goes on while the machine sleeps.
        let timer = Timer::new(ClockId::CLOCK_BOOTTIME, SigEvent::new(kill))?;
        let shared = Arc::new(Shared::default());
        let watched = Arc::clone(&shared);
        std::thread::Builder::new().name("watchdog".to_owned()).spawn(move || watch(&watched))?;
        Ok(Self { timer: Mutex::new(OwnTimer(timer)), shared })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.state.lock().stop = true;
        self.shared.changed.notify_one();
    }
}

impl cluster::Watchdog for Watchdog {
    fn set(&self, held: Option<Duration>) {
        let mut timer = self.timer.lock();
        let mut state = self.shared.state.lock();
        let now = Instant::now();
        let held = held.filter(|held| *held < NEVER);
        if held.is_some_and(|held| held.is_zero()) && state.until.is_some_and(|until| until <= now)
        {
            return;
        }
        let earlier = match (state.until, held) {
            (Some(until), Some(held)) => now + held < until,
            (None, held) => held.is_some(),
            (Some(_), None) => false,
        };
        state.until = held.map(|held| now + held);
        // Later than what the thread waits for, it finds out by itself.
        if earlier {
            self.shared.changed.notify_one();
        }
        // Zero disarms it.
        let after = held.map_or(Duration::ZERO, |held| held + GRACE);
        let set =
            timer.0.set(Expiration::OneShot(TimeSpec::from(after)), TimerSetTimeFlags::empty());
        if let Err(error) = set {
            tracing::error!(%error, "the timer that guards ownership cannot be set: a stopped process may act after its lease");
        }
    }
}

/// Says why and aborts when what is owned was not let go of in time.
fn watch(shared: &Shared) {
    let mut state = shared.state.lock();
    while !state.stop {
        let Some(until) = state.until else {
            shared.changed.wait(&mut state);
            continue;
        };
        let late = until + ABORT_AFTER;
        if Instant::now() >= late {
            // Nothing can be done if standard error is gone; if it hangs, the kernel does the rest.
            let _gone = writeln!(
                io::stderr(),
                "what this node owns went on for {ABORT_AFTER:?} after its lease: the process ends, so that the next owner is alone; \
                 a thread is stalled, the process was stopped, or the machine has too much to do"
            );
            std::process::abort();
        }
        // A spurious waking is as good as any.
        let _timed_out = shared.changed.wait_until(&mut state, late);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::{Child, Command, Stdio};

    use fieldline_contracts::{Deadline, Lease, Watchdog as _};
    use fieldline_model::placement::Epoch;

    use super::*;

    const LEASE: Duration = Duration::from_millis(500);
    const ROLE: &str = "FIELDLINE_TEST_WATCHDOG";

    /// Runs a test of this module in a process of its own, as `role`.
    fn child(role: &str) -> Child {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "watchdog::tests::as_a_child", "--nocapture"])
            .env(ROLE, role)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Owns something and does as its role says; does nothing where it is no child.
    #[tokio::test]
    async fn as_a_child() {
        let Ok(role) = std::env::var(ROLE) else { return };
        let node = Arc::new(Deadline::new());
        node.guard_by(Arc::new(Watchdog::start().unwrap()));
        node.renew(tokio::time::Instant::now(), LEASE);
        let own = Arc::new(Deadline::never());
        let lease = Lease::new("key".to_owned(), Epoch(1), Arc::clone(&node), own, Box::new(()));
        match role.as_str() {
            // No other thread of it can do anything about this one.
            "stalls" => std::thread::sleep(Duration::from_secs(60)),
            "is stopped" => {
                rustix::process::kill_process(
                    rustix::process::getpid(),
                    rustix::process::Signal::STOP,
                )
                .unwrap();
                // It stops some moments after it asked for it, and may act while it may.
                while lease.is_held() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                writeln!(io::stderr(), "it acts after its lease").unwrap();
            }
            "lets go" => {
                lease.lost().await;
                drop(lease);
                std::thread::sleep(LEASE + GRACE * 2);
            }
            "renews" => {
                for _ in 0..8 {
                    tokio::time::sleep(LEASE / 3).await;
                    node.renew(tokio::time::Instant::now(), LEASE);
                }
                lease.release();
                std::thread::sleep(LEASE + GRACE * 2);
            }
            other => panic!("{other}"),
        }
    }

    #[test]
    fn a_stalled_owner_says_so_and_ends() {
        let began = Instant::now();
        let ended = child("stalls").wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.signal(), Some(6), "{said}");
        assert!(said.contains("went on for 300ms after its lease"), "{said}");
        assert!(began.elapsed() >= LEASE);
    }

    #[test]
    fn a_stopped_owner_ends_without_waking() {
        // Nobody sends it SIGCONT.
        let ended = child("is stopped").wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.signal(), Some(9), "{said}");
        assert!(!said.contains("acts"), "{said}");
    }

    #[test]
    fn an_owner_that_lets_go_or_renews_lives_on() {
        for child in ["lets go", "renews"].map(child) {
            let ended = child.wait_with_output().unwrap();
            assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
        }
    }

    /// This very process would end.
    #[test]
    fn a_watchdog_with_nothing_to_watch_does_nothing() {
        let watchdog = Watchdog::start().unwrap();
        watchdog.set(Some(Duration::MAX));
        watchdog.set(Some(Duration::from_millis(50)));
        watchdog.set(None);
        std::thread::sleep(GRACE * 2);
    }
}
