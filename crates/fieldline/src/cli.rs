//! The command line. `fieldline --help` is documentation.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::certificates::CertificatesCommand;
use crate::node::Role;

/// Connects devices of any kind to a platform that you run.
///
/// `fieldline up --demo` starts everything on this machine, with a simulated
/// fleet, and prints a link to sign in with.
#[derive(Debug, Parser)]
#[command(name = "fieldline", version, max_term_width = 100)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start Fieldline on this machine: everything in one process, watched by a small master
    Up(UpArgs),
    /// Start one node of a cluster, on etcd, PostgreSQL, Redis and an MQTT broker
    Serve(ServeArgs),
    /// Work with protocol descriptions
    #[command(subcommand)]
    Protocol(ProtocolCommand),
    /// Play devices
    #[command(subcommand)]
    Simulate(SimulateCommand),
    /// Manage the objects of a running server
    Ctl(CtlArgs),
    /// Say in words what is wrong with this machine, a data directory or a running server
    Doctor(DoctorArgs),
    /// Make the certificates by which the nodes of a cluster know each other
    #[command(subcommand)]
    Certificates(CertificatesCommand),
    /// Print a document that is generated from the code
    #[command(hide = true)]
    Generate {
        /// Which
        document: Document,
    },
}

/// Arguments of `up`.
#[derive(Clone, Debug, Args)]
pub(crate) struct UpArgs {
    /// Where data is kept; created if missing
    #[arg(long, value_name = "DIR", default_value = "fieldline-data", env = "FIELDLINE_DATA")]
    pub(crate) data: PathBuf,
    /// Add channels and a simulated fleet whose bytes go through real sockets
    #[arg(long)]
    pub(crate) demo: bool,
    /// Devices of the simulated fleet
    #[arg(long, value_name = "N", default_value_t = 40, requires = "demo")]
    pub(crate) demo_devices: u32,
    /// Let channels made by --demo take free ports instead of their usual ones
    #[arg(long, hide = true, requires = "demo")]
    pub(crate) demo_free_ports: bool,
    /// Address of the API and console [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR")]
    pub(crate) http: Option<SocketAddr>,
    /// Address of the MQTT broker [default: 127.0.0.1:1883]
    #[arg(long, value_name = "ADDR")]
    pub(crate) mqtt: Option<SocketAddr>,
    /// Address that channels made by --demo listen on
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    pub(crate) device: IpAddr,
    /// Configuration file; every key has a default
    #[arg(long, value_name = "FILE", env = "FIELDLINE_CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// Token for the administrator at the first start, instead of a random one
    #[arg(long, value_name = "TOKEN", env = "FIELDLINE_ADMIN_TOKEN", hide_env_values = true)]
    pub(crate) admin_token: Option<String>,
    /// Run in this process alone, without a master that starts it again
    #[arg(long)]
    pub(crate) no_master: bool,
    /// This process is the worker of a master
    #[arg(long, hide = true)]
    pub(crate) worker: bool,
}

/// Arguments of `serve`.
#[derive(Clone, Debug, Args)]
pub(crate) struct ServeArgs {
    /// What this node does; may be repeated [default: all]
    #[arg(long = "role", value_enum, value_name = "ROLE", value_delimiter = ',')]
    pub(crate) roles: Vec<Role>,
    /// Configuration file: where the servers of the cluster are
    #[arg(long, value_name = "FILE", env = "FIELDLINE_CONFIG")]
    pub(crate) config: PathBuf,
    /// Name of this node [default: the name of the machine]
    #[arg(long, value_name = "NAME", env = "FIELDLINE_NODE")]
    pub(crate) node: Option<String>,
    /// Address of the API and console [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR")]
    pub(crate) http: Option<SocketAddr>,
    /// Address of the MQTT broker [default: 127.0.0.1:1883]
    #[arg(long, value_name = "ADDR")]
    pub(crate) mqtt: Option<SocketAddr>,
    /// Token for the administrator at the first start, instead of a random one
    #[arg(long, value_name = "TOKEN", env = "FIELDLINE_ADMIN_TOKEN", hide_env_values = true)]
    pub(crate) admin_token: Option<String>,
    /// Run as the worker of a small master that starts it again; as process 1 of a container it always does
    #[arg(long)]
    pub(crate) master: bool,
    /// This process is the worker of a master
    #[arg(long, hide = true)]
    pub(crate) worker: bool,
}

/// What to do with protocols. A protocol is named, or given as a file or folder.
#[derive(Debug, Subcommand)]
pub(crate) enum ProtocolCommand {
    /// List the built-in protocols
    List,
    /// Compile and report every error with its place
    Check {
        /// Protocol files, folders or built-in names
        #[arg(required = true, value_name = "PROTOCOL")]
        protocols: Vec<String>,
    },
    /// Put files into the standard layout
    Fmt {
        /// Only say which files are not
        #[arg(long)]
        check: bool,
        /// Protocol files
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Decode bytes and print messages and answers as JSON
    Decode(DecodeArgs),
    /// Decode bytes and print every field with its place
    Trace(DecodeArgs),
    /// Show the compiled program
    Disasm {
        /// Protocol file, folder or built-in name
        protocol: String,
    },
    /// Run test vectors and sessions; the last line says `N passed, N failed`
    Test(TestArgs),
}

/// Bytes to decode.
#[derive(Debug, Args)]
pub(crate) struct DecodeArgs {
    /// Protocol file, folder or built-in name
    pub(crate) protocol: String,
    /// Bytes as hex digits; read from standard input if absent
    pub(crate) hex: Option<String>,
    /// The transport they came by
    #[arg(long, value_enum, default_value_t = TransportArg::Tcp)]
    pub(crate) transport: TransportArg,
    /// Decode as a connection that has signed in under this identity
    #[arg(long, value_name = "IDENT")]
    pub(crate) ident: Option<String>,
    /// Switch a device setting on, or set it: `io16` or `io16=true`
    #[arg(long = "setting", value_name = "NAME[=VALUE]")]
    pub(crate) settings: Vec<String>,
    /// Note wrong checksums and lengths, but decode all the same
    #[arg(long)]
    pub(crate) lenient: bool,
}

/// A transport.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum TransportArg {
    /// TCP or TLS
    Tcp,
    /// UDP
    Udp,
}

/// What to test.
#[derive(Debug, Args)]
pub(crate) struct TestArgs {
    /// Folders of protocols, to run the vectors.json in each
    #[arg(value_name = "FOLDER")]
    pub(crate) folders: Vec<PathBuf>,
    /// File of vectors
    #[arg(long, value_name = "FILE")]
    pub(crate) vectors: Vec<PathBuf>,
    /// File of sessions, run against a gateway over real sockets
    #[arg(long, value_name = "FILE")]
    pub(crate) sessions: Vec<PathBuf>,
    /// Only this protocol; may be repeated
    #[arg(long = "protocol", value_name = "NAME")]
    pub(crate) protocols: Vec<String>,
}

/// What to play.
#[derive(Debug, Subcommand)]
pub(crate) enum SimulateCommand {
    /// Vehicles that drive, and speak a tracker's protocol
    Trackers {
        /// Protocol to speak: teltonika or wialon_ips
        #[arg(long, value_name = "P")]
        protocol: String,
        /// How many
        #[arg(long, value_name = "N", default_value_t = 10)]
        devices: u32,
        /// Messages a second of each; 0 for as fast as is acknowledged
        #[arg(long, value_name = "R", default_value_t = 1.0)]
        rate: f64,
        /// Where to connect
        #[arg(long, value_name = "HOST:PORT")]
        target: String,
        /// The transport to use
        #[arg(long, value_enum, default_value_t = TransportArg::Tcp)]
        transport: TransportArg,
        /// Seed of routes and identities: the same seed is the same fleet
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Stop after so many seconds
        #[arg(long, value_name = "SECONDS")]
        duration: Option<u64>,
        /// Write every acknowledged record to this file
        #[arg(long, value_name = "FILE")]
        journal: Option<PathBuf>,
        /// How to print the result
        #[arg(long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
}

/// Which server, and what to ask of it.
#[derive(Debug, Args)]
pub(crate) struct CtlArgs {
    /// The server
    #[arg(long, env = "FIELDLINE_URL", default_value = "http://127.0.0.1:8080", global = true)]
    pub(crate) url: String,
    /// API token
    #[arg(long, env = "FIELDLINE_TOKEN", hide_env_values = true, global = true)]
    pub(crate) token: Option<String>,
    /// PEM file of certificate authorities to trust besides the system's
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) ca: Option<PathBuf>,
    /// How to print
    #[arg(long, value_enum, default_value_t = Output::Table, global = true)]
    pub(crate) output: Output,
    /// What to ask
    #[command(subcommand)]
    pub(crate) command: CtlCommand,
}

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people
    Table,
    /// For programs
    Json,
}

/// Objects that `ctl` manages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Objects {
    /// Tenants
    Accounts,
    /// People who sign in
    Users,
    /// API tokens
    Tokens,
    /// Devices
    Devices,
    /// Listeners for devices
    Channels,
    /// Protocol descriptions
    Protocols,
    /// Declared parameters
    Parameters,
}

/// What to ask of a server.
#[derive(Debug, Subcommand)]
pub(crate) enum CtlCommand {
    /// List objects
    List {
        /// Kind of objects
        objects: Objects,
        /// Query such as `q=van` or `online=true`; may be repeated
        #[arg(long = "where", value_name = "NAME=VALUE")]
        filters: Vec<String>,
    },
    /// Show one object
    Get {
        /// Kind of object
        objects: Objects,
        /// Its id, or a protocol's name
        id: String,
    },
    /// Create an object from NAME=VALUE pairs or JSON
    Create {
        /// Kind of object
        objects: Objects,
        /// Members as NAME=VALUE; a value that is JSON is taken as such
        #[arg(value_name = "NAME=VALUE")]
        members: Vec<String>,
        /// The object as JSON, or `-` for standard input
        #[arg(long)]
        json: Option<String>,
    },
    /// Change members of an object
    Patch {
        /// Kind of object
        objects: Objects,
        /// Its id
        id: String,
        /// Members as NAME=VALUE; a value that is JSON is taken as such
        #[arg(value_name = "NAME=VALUE")]
        members: Vec<String>,
        /// The members as JSON, or `-` for standard input
        #[arg(long)]
        json: Option<String>,
    },
    /// Delete an object
    Delete {
        /// Kind of object
        objects: Objects,
        /// Its id, or a protocol's name
        id: String,
    },
    /// Upload a protocol description
    Upload {
        /// Name of the protocol
        name: String,
        /// File of its source
        file: PathBuf,
    },
    /// Show a device's newest messages
    Messages {
        /// The device's id
        device: String,
        /// How many
        #[arg(long, default_value_t = 20)]
        limit: usize,
    },
    /// Show a device's last values
    State {
        /// The device's id
        device: String,
    },
    /// Show a device's log
    Log {
        /// The device's id
        device: String,
        /// How many lines
        #[arg(long, default_value_t = 20)]
        limit: usize,
    },
    /// Send a command to a device
    Send {
        /// The device's id
        device: String,
        /// The command's name
        name: String,
        /// Arguments as NAME=VALUE
        #[arg(value_name = "NAME=VALUE")]
        params: Vec<String>,
        /// How long it is worth sending, in seconds
        #[arg(long, default_value_t = 3_600)]
        ttl_s: u32,
        /// How long to wait for the answer, in milliseconds; 0 returns at once
        #[arg(long, default_value_t = 15_000)]
        wait_ms: u64,
    },
    /// Show what the server is and holds
    System,
}

/// Arguments of `doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Data directory to look at [default: fieldline-data, and none with the configuration of a node]
    #[arg(long, value_name = "DIR", env = "FIELDLINE_DATA")]
    pub(crate) data: Option<PathBuf>,
    /// Configuration file to judge; with that of a node, its servers and the other nodes are looked at
    #[arg(long, value_name = "FILE", env = "FIELDLINE_CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// Server to ask [default: the one that uses the data directory or the configuration]
    #[arg(long, env = "FIELDLINE_URL")]
    pub(crate) url: Option<String>,
    /// PEM file of certificate authorities to trust besides the system's
    #[arg(long, value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
    /// Leave stored messages unread: only logs' names and indexes are looked at
    #[arg(long)]
    pub(crate) quick: bool,
    /// How to print
    #[arg(long, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
}

/// A generated document.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Document {
    /// The OpenAPI description
    Openapi,
    /// The command line
    Cli,
    /// Close codes
    CloseCodes,
    /// The parameter dictionary
    Parameters,
}
