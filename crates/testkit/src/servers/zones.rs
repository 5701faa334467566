//! Zones of failure on one machine: network namespaces on one bridge, any of which can be cut off, wholly or one way.
//!
//! Frames are dropped at the bridge without a word, as where a switch has died: connections stay, and nobody is told.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::place::Place;
use super::process::find;

/// Most sets of zones at a time on one machine.
const SETS_MAX: usize = 200;
/// Before the names of all that is made here.
const PREFIX: &str = "flz";

/// Zones that nobody else sees; gone when dropped, and what an aborted test left is removed when the next begins.
///
/// Zone `n` of set `s` has the address 198.18.`s`.(10 + `n`); this process is at 198.18.`s`.1 for all of them.
pub struct Zones {
    set: usize,
    count: usize,
    /// Held for as long as the set is used, also by a process that is killed.
    _lock: File,
}

impl Zones {
    /// Makes `count` zones that reach each other and this process.
    ///
    /// # Panics
    ///
    /// When they cannot be made: a test of faults that cannot cut anything off must not pass.
    #[must_use]
    pub fn start(count: usize) -> Self {
        assert!((1..=200).contains(&count), "1 to 200 zones have addresses");
        assert!(
            rustix::process::geteuid().is_root(),
            "network namespaces need root: run these tests as root, such as with `sudo --preserve-env=PATH,HOME`"
        );
        remove_leftovers();
        let (set, lock) = (1..=SETS_MAX)
            .find_map(|set| Some((set, try_lock(set)?)))
            .expect("a set of zones is free; others are used by tests that run now");
        // The lock's former owner may have died since.
        remove(set);
        let zones = Self { set, count, _lock: lock };
        zones.build();
        zones
    }

    /// The address of this process, for programs in the zones.
    #[must_use]
    pub fn host(&self) -> Ipv4Addr {
        self.address_of(1)
    }

    /// The first is 0.
    ///
    /// # Panics
    ///
    /// When there is none of that number.
    #[must_use]
    pub fn place(&self, zone: usize) -> Place {
        self.check(zone);
        let ip: OsString = find("ip", "iproute2").into();
        let launcher = [ip, "netns".into(), "exec".into(), self.namespace(zone).into()];
        Place::within(launcher, self.address_of(10 + zone))
    }

    /// Nothing comes in or goes out.
    ///
    /// # Panics
    ///
    /// When the system refuses to, here and below.
    pub fn cut(&self, zone: usize) {
        self.drop_from(zone);
        self.drop_to(zone);
    }

    /// What it sends is lost; what is sent to it arrives.
    pub fn cut_from(&self, zone: usize) {
        self.drop_from(zone);
    }

    /// What is sent to it is lost; what it sends arrives.
    pub fn cut_to(&self, zone: usize) {
        self.drop_to(zone);
    }

    /// All goes through again.
    pub fn heal(&self, zone: usize) {
        self.check(zone);
        // Adding what is there and deleting what was just added cannot fail: no need to know which way it was cut.
        let port = port(zone);
        self.nft(&format!(
            "add element bridge cut from {{ {port} }}\nadd element bridge cut to {{ {port} }}\n\
             delete element bridge cut from {{ {port} }}\ndelete element bridge cut to {{ {port} }}\n"
        ));
    }

    /// What zone `from` sends to zone `to` is lost; all else goes through.
    ///
    /// # Panics
    ///
    /// When there is no such zone, or the system refuses to; here and below.
    pub fn cut_link(&self, from: usize, to: usize) {
        self.nft(&format!("add element bridge cut links {{ {} }}\n", self.link(from, to)));
    }

    /// What zone `from` sends to zone `to` goes through again.
    pub fn heal_link(&self, from: usize, to: usize) {
        self.nft(&format!("delete element bridge cut links {{ {} }}\n", self.link(from, to)));
    }

    fn link(&self, from: usize, to: usize) -> String {
        self.check(from);
        self.check(to);
        format!("{} . {}", port(from), port(to))
    }

    fn drop_from(&self, zone: usize) {
        self.check(zone);
        self.nft(&format!("add element bridge cut from {{ {} }}\n", port(zone)));
    }

    fn drop_to(&self, zone: usize) {
        self.check(zone);
        self.nft(&format!("add element bridge cut to {{ {} }}\n", port(zone)));
    }

    fn check(&self, zone: usize) {
        assert!(zone < self.count, "there are {} zones, so no {zone}", self.count);
    }

    fn address_of(&self, last: usize) -> Ipv4Addr {
        let byte = |number: usize| u8::try_from(number).expect("it is below 256");
        Ipv4Addr::new(198, 18, byte(self.set), byte(last))
    }

    fn namespace(&self, zone: usize) -> String {
        format!("{}{zone}", within(self.set))
    }

    /// The bridge has a namespace of its own, so that no firewall of this machine meddles.
    fn build(&self) {
        let (set, hub) = (self.set, hub(self.set));
        ip(&["netns", "add", &hub]);
        ip(&["-n", &hub, "link", "add", "bridge", "type", "bridge"]);
        ip(&["-n", &hub, "link", "set", "bridge", "up"]);
        let host = host(set);
        let attach = |port: &str| {
            ip(&["-n", &hub, "link", "set", port, "master", "bridge", "up"]);
        };
        ip(&["link", "add", &host, "type", "veth", "peer", "name", "host", "netns", &hub]);
        attach("host");
        ip(&["address", "add", &format!("{}/24", self.host()), "dev", &host]);
        ip(&["link", "set", &host, "up"]);
        for zone in 0..self.count {
            let (namespace, port) = (self.namespace(zone), port(zone));
            ip(&["netns", "add", &namespace]);
            ip(&[
                "-n", &hub, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns",
                &namespace,
            ]);
            attach(&port);
            let address = format!("{}/24", self.address_of(10 + zone));
            ip(&["-n", &namespace, "address", "add", &address, "dev", "eth0"]);
            ip(&["-n", &namespace, "link", "set", "eth0", "up"]);
            ip(&["-n", &namespace, "link", "set", "lo", "up"]);
            // Away from the ports of `free_port`: none may be taken by a connection from there while a server is restarted.
            let range = "echo 10000 30000 > /proc/sys/net/ipv4/ip_local_port_range";
            ip(&["netns", "exec", &namespace, "sh", "-c", range]);
        }
        self.nft(
            "add table bridge cut\n\
             add set bridge cut from { type ifname; }\nadd set bridge cut to { type ifname; }\n\
             add set bridge cut links { type ifname . ifname; }\n\
             add chain bridge cut in { type filter hook prerouting priority 0; }\n\
             add chain bridge cut through { type filter hook forward priority 0; }\n\
             add chain bridge cut out { type filter hook postrouting priority 0; }\n\
             add rule bridge cut in iifname @from drop\nadd rule bridge cut out oifname @to drop\n\
             add rule bridge cut through iifname . oifname @links drop\n",
        );
    }

    /// Carries out `commands` at the bridge, all or none.
    fn nft(&self, commands: &str) {
        let nft = find("nft", "nftables");
        let mut command = Command::new(find("ip", "iproute2"));
        command.args(["netns", "exec", &hub(self.set)]).arg(nft).arg(commands);
        ran(&mut command);
    }
}

impl Drop for Zones {
    fn drop(&mut self) {
        remove(self.set);
    }
}

fn within(set: usize) -> String {
    format!("{PREFIX}{set}-")
}

/// This process's end of the wire to the bridge.
fn host(set: usize) -> String {
    format!("{PREFIX}{set}")
}

fn hub(set: usize) -> String {
    format!("{}hub", within(set))
}

fn port(zone: usize) -> String {
    format!("zone{zone}")
}

fn lock_file(set: usize) -> PathBuf {
    Path::new("/run/lock").join(format!("fieldline-zones-{set}"))
}

/// The lock of a set that no living process uses.
fn try_lock(set: usize) -> Option<File> {
    let options = File::options().create(true).truncate(false).write(true).open(lock_file(set));
    let file = options.expect("/run/lock takes a file");
    file.try_lock().ok().map(|()| file)
}

/// Namespaces of all sets, by set.
fn namespaces() -> Vec<(usize, String)> {
    let listed = Command::new(find("ip", "iproute2")).args(["netns", "list"]).output();
    let listed = listed.expect("ip can be run");
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    let names = text.lines().filter_map(|line| line.split_whitespace().next());
    let of_set = |name: &str| {
        let set = name.strip_prefix(PREFIX)?.split_once('-')?.0.parse().ok()?;
        Some((set, name.to_owned()))
    };
    names.filter_map(of_set).collect()
}

/// Removes the sets of processes that died.
fn remove_leftovers() {
    let sets: BTreeSet<usize> = namespaces().into_iter().map(|(set, _)| set).collect();
    for set in sets {
        if let Some(_lock) = try_lock(set) {
            remove(set);
        }
    }
}

/// Removes a set, and ends what still runs in it.
fn remove(set: usize) {
    // What is not there cannot be removed: then this prints an error that nobody needs.
    let ip = |arguments: &[&str]| {
        let mut command = Command::new(find("ip", "iproute2"));
        command.args(arguments).output().map(|output| output.stdout).unwrap_or_default()
    };
    // A namespace goes some time after it was deleted; this end of the wire must be gone at once.
    ip(&["link", "delete", &host(set)]);
    for (_, namespace) in namespaces().into_iter().filter(|(of, _)| *of == set) {
        let pids = ip(&["netns", "pids", &namespace]);
        for pid in String::from_utf8_lossy(&pids).split_whitespace() {
            let pid = pid.parse().ok().and_then(rustix::process::Pid::from_raw);
            // It may have ended meanwhile.
            pid.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::KILL));
        }
        ip(&["netns", "delete", &namespace]);
    }
}

fn ip(arguments: &[&str]) {
    ran(Command::new(find("ip", "iproute2")).args(arguments));
}

fn ran(command: &mut Command) {
    let output = command.output().expect("the program can be run");
    let printed = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{command:?}: {} (this needs a kernel with network namespaces, veth, bridges and nf_tables for bridges)",
        printed.trim()
    );
}
