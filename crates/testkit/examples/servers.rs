//! Starts the servers that a cluster stands on, prints where they are as one line of JSON, and stops them when its
//! input ends. `cargo xtask cluster` runs it.

use std::io::{Read as _, Write as _};

use fieldline_testkit::servers::{Etcd, Mosquitto, Postgres, Redis};

fn main() -> std::io::Result<()> {
    let (etcd, postgres) = (Etcd::start(), Postgres::start());
    let (redis, mosquitto) = (Redis::start(), Mosquitto::start());
    let places = serde_json::json!({
        "etcd": etcd.url(),
        "postgres": postgres.url(),
        "redis": redis.url(),
        "bus": format!("mqtt://127.0.0.1:{}", mosquitto.port()),
    });
    writeln!(std::io::stdout(), "{places}")?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
