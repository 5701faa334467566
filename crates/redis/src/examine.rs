//! A look at the server from outside, for `fieldline doctor`. It writes one key of its own, which ends by itself.

use std::time::Duration;

use fieldline_contracts::Clock;
use fieldline_contracts::finding::Finding;
use fieldline_model::Timestamp;
use redis::PushInfo;
use redis::aio::MultiplexedConnection;
use tokio::time::timeout;

use crate::config::{ConnectError, RedisConfig};
use crate::connect::{self, connect, in_words};
use crate::scripts::Scripts;

/// Longest that one question may take.
const ASK_MAX: Duration = Duration::from_secs(3);

/// Looks whether the server can be relied on.
pub async fn examine(config: &RedisConfig, clock: &dyn Clock) -> Vec<Finding> {
    if let Err(problems) = config.validate() {
        let error = ConnectError(problems.join("; "));
        return vec![Finding::of_error("redis", "redis.url", &error)];
    }
    match look(config, clock).await {
        Ok(findings) => findings,
        Err(error) => vec![Finding::of_error("redis", "redis.url", &error)],
    }
}

async fn look(config: &RedisConfig, clock: &dyn Clock) -> Result<Vec<Finding>, ConnectError> {
    let info = connect::info(&config.url)?;
    connect::choose_provider(&info);
    let place = info.addr().to_string();
    let client = connect::client(info, config.tls_ca.as_deref())?;
    let nobody = None::<fn(PushInfo) -> Result<(), ()>>;
    let mut connection = connect(&client, &Scripts::new(), nobody).await?.connection;
    let text = connect::information(&mut connection, &place).await?;
    let get = |name: &str| connect::field(&text, name);
    let mut findings =
        vec![Finding::ok("redis", &place, format!("it answers, version {}", get("redis_version")))];
    let number = |name: &str| get(name).parse::<u64>().unwrap_or(0);
    let (used, most) = (number("used_memory"), number("maxmemory"));
    let found = if most == 0 {
        format!("{} MiB used, no limit", used >> 20)
    } else {
        format!("{} of {} MiB used", used >> 20, most >> 20)
    };
    findings.push(if most > 0 && used / 9 >= most / 10 {
        Finding::warning("redis memory", &place, found, "raise maxmemory before writes are refused")
    } else {
        Finding::ok("redis memory", &place, found)
    });
    findings.push(writes(&mut connection, config, &place).await);
    if get("rdb_last_bgsave_status") == "err" || get("aof_last_write_status") == "err" {
        findings.push(Finding::warning(
            "redis persistence",
            &place,
            "it could not save to disk the last time",
            "make room or correct `dir` of the server, or switch saving off: Fieldline does not need it",
        ));
    }
    let before = clock.now();
    let time = redis::cmd("TIME");
    if let Ok(Ok((seconds, micros))) =
        timeout(ASK_MAX, time.query_async::<(i64, i64)>(&mut connection)).await
    {
        let theirs = Timestamp::from_seconds(seconds).plus_micros(micros);
        findings.push(Finding::of_clock("clock", &place, theirs, (before, clock.now())));
    }
    Ok(findings)
}

/// Whether it takes writes: only a write tells.
async fn writes(
    connection: &mut MultiplexedConnection,
    config: &RedisConfig,
    place: &str,
) -> Finding {
    let mut set = redis::cmd("SET");
    set.arg(format!("{}:doctor", config.prefix)).arg("1").arg("PX").arg(1_000);
    let check = "redis writes";
    let error = match timeout(ASK_MAX, set.query_async::<()>(connection)).await {
        Ok(Ok(())) => return Finding::ok(check, place, "it takes them"),
        Ok(Err(error)) => error,
        Err(_) => {
            return Finding::broken(
                check,
                place,
                "a write is not answered",
                "see whether it hangs",
            );
        }
    };
    let remedy = match error.code().unwrap_or_default() {
        "MISCONF" => {
            "make room or correct `dir` of the server, or switch saving off (`save \"\"`): Fieldline does not need it"
        }
        "OOM" => "raise maxmemory",
        "READONLY" => "let `redis.url` name the primary",
        _ => return Finding::of_error(check, place, &in_words(place, &error)),
    };
    Finding::broken(check, place, format!("it refuses them: {error}"), remedy)
}
