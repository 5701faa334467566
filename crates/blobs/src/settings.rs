//! Settings, and what can be wrong with them.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

/// `[blobs]`: where cold segments and binaries are kept: `directory` or `url`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// A directory of this machine, used by one process.
    pub directory: Option<PathBuf>,
    /// `s3://BUCKET[/PREFIX]`: a bucket of storage that speaks S3. Several installations may share one, with a prefix each.
    pub url: Option<String>,
    /// Where the storage is, `http://HOST[:PORT]` or `https://…`; that of AWS if it is not set.
    pub endpoint: Option<String>,
    /// Its region. Default `us-east-1`, which is what most storage of one's own expects.
    pub region: String,
    /// The key; with `secret_access_key`. If neither is set, both are taken from `AWS_ACCESS_KEY_ID` and
    /// `AWS_SECRET_ACCESS_KEY`, or from what the machine, container or pod is given by its cloud.
    pub access_key_id: Option<String>,
    /// The secret of the key.
    pub secret_access_key: Option<String>,
    /// Whether the bucket stands in the path instead of the host name. Default: where `endpoint` is set.
    pub path_style: Option<bool>,
    /// PEM file with the certificates of those who sign the storage's; the machine's own if it is not set.
    pub tls_ca: Option<PathBuf>,
    /// Longest that one request may take: 8 MiB are sent in it. 1s to 10m.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// How long a request that failed is tried again. Up to 2m.
    #[serde(with = "humantime_serde")]
    pub retry_for: Duration,
    /// How often it is looked whether the storage is there. 100ms to 1h.
    #[serde(with = "humantime_serde")]
    pub look_every: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            directory: None,
            url: None,
            endpoint: None,
            region: "us-east-1".to_owned(),
            access_key_id: None,
            secret_access_key: None,
            path_style: None,
            tls_ca: None,
            timeout: Duration::from_secs(30),
            retry_for: Duration::from_secs(15),
            look_every: Duration::from_secs(30),
        }
    }
}

/// Where blobs are to be kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a directory.
    Directory(PathBuf),
    /// In a bucket, before all keys a prefix: empty, or ending with `/`.
    Bucket {
        /// The bucket.
        bucket: String,
        /// The prefix.
        prefix: String,
    },
}

/// Reads `s3://BUCKET[/PREFIX]`.
fn bucket(url: &str) -> Option<Place> {
    let rest = url.strip_prefix("s3://")?;
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b);
    let in_prefix = |b: u8| b.is_ascii_alphanumeric() || b"-_.=".contains(&b);
    let part =
        |part: &str| !part.is_empty() && part.bytes().all(in_prefix) && !part.starts_with('.');
    let named = (3..=63).contains(&bucket.len()) && bucket.bytes().all(plain);
    let below = prefix.is_empty() || (prefix.len() <= 512 && prefix.split('/').all(part));
    if !named || !below {
        return None;
    }
    let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
    Some(Place::Bucket { bucket: bucket.to_owned(), prefix })
}

/// Host and port of `http://HOST[:PORT]` or `https://…`, without what follows.
pub(crate) fn host(endpoint: &str) -> Option<&str> {
    let host = endpoint.strip_prefix("http://").or_else(|| endpoint.strip_prefix("https://"))?;
    let host = host.strip_suffix('/').unwrap_or(host);
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-.:[]_".contains(&b);
    (!host.is_empty() && host.bytes().all(plain)).then_some(host)
}

impl Settings {
    /// Where blobs are to be kept; `None` if nothing is said of it.
    #[must_use]
    pub fn place(&self) -> Option<Place> {
        match (&self.directory, &self.url) {
            (Some(directory), _) => Some(Place::Directory(directory.clone())),
            (None, Some(url)) => bucket(url),
            (None, None) => None,
        }
    }

    /// Checks what types cannot, and returns every problem at once, one sentence each.
    ///
    /// # Errors
    ///
    /// The sentences.
    pub fn check(&self) -> Result<(), Vec<String>> {
        // Exhaustive on purpose: a new key does not compile until it is judged here.
        let Self {
            directory,
            url,
            endpoint,
            region,
            access_key_id,
            secret_access_key,
            path_style,
            tls_ca,
            timeout,
            retry_for,
            look_every,
        } = self;
        let mut problems = Vec::new();
        let mut check = |holds: bool, problem: &str| {
            if !holds {
                problems.push(problem.to_owned());
            }
        };
        check(
            directory.is_none() || url.is_none(),
            "`blobs.directory` and `blobs.url` are both set: keep the one where blobs are to be",
        );
        check(
            directory.as_ref().is_none_or(|directory| !directory.as_os_str().is_empty()),
            "`blobs.directory` is empty: name a directory, or leave it out",
        );
        let of_url = [
            ("endpoint", endpoint.is_some()),
            ("access_key_id", access_key_id.is_some()),
            ("secret_access_key", secret_access_key.is_some()),
            ("path_style", path_style.is_some()),
            ("tls_ca", tls_ca.is_some()),
        ];
        for (key, set) in of_url {
            check(
                !set || url.is_some(),
                &format!(
                    "`blobs.{key}` is set without `blobs.url`: add the bucket, s3://BUCKET, or leave it out"
                ),
            );
        }
        check(
            url.as_ref().is_none_or(|url| bucket(url).is_some()),
            "`blobs.url` is not of the form s3://BUCKET or s3://BUCKET/PREFIX: a bucket has 3 to 63 of a-z, 0-9, `-` and `.`; where the storage is stands in `blobs.endpoint`",
        );
        check(
            endpoint.as_ref().is_none_or(|endpoint| host(endpoint).is_some()),
            "`blobs.endpoint` is not of the form http://HOST:PORT or https://HOST: write it so, without the bucket",
        );
        check(
            access_key_id.is_some() == secret_access_key.is_some(),
            "`blobs.access_key_id` and `blobs.secret_access_key` belong together: set both, or neither to take them from the environment",
        );
        check(!region.is_empty(), "`blobs.region` is empty: leave it out for us-east-1");
        check(
            tls_ca.is_none() || endpoint.as_ref().is_some_and(|e| e.starts_with("https://")),
            "`blobs.tls_ca` is set, and `blobs.endpoint` is without TLS: write https://",
        );
        let within = |least: u64, most: u64, value: &Duration| {
            (Duration::from_millis(least)..=Duration::from_millis(most)).contains(value)
        };
        check(
            within(1_000, 600_000, timeout),
            "`blobs.timeout` is between 1s and 10m; 30s is usual",
        );
        check(within(0, 120_000, retry_for), "`blobs.retry_for` is at most 2m; 15s is usual");
        check(
            within(100, 3_600_000, look_every),
            "`blobs.look_every` is between 100ms and 1h; 30s is usual",
        );
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(url: &str) -> Settings {
        Settings { url: Some(url.to_owned()), ..Settings::default() }
    }

    #[test]
    fn a_place_is_read_from_the_url() {
        let place = |bucket: &str, prefix: &str| {
            Some(Place::Bucket { bucket: bucket.to_owned(), prefix: prefix.to_owned() })
        };
        for (url, expected) in [
            ("s3://fieldline", place("fieldline", "")),
            ("s3://fieldline/", place("fieldline", "")),
            ("s3://my.bucket-1/a/B_2/", place("my.bucket-1", "a/B_2/")),
            ("s3://ab", None),
            ("s3://", None),
            ("s3://Upper", None),
            ("s3://bucket//a", None),
            ("s3://bucket/../a", None),
            ("http://bucket", None),
            ("bucket", None),
        ] {
            assert_eq!(of(url).place(), expected, "{url}");
            assert_eq!(of(url).check().is_ok(), expected.is_some(), "{url}");
        }
    }

    #[test]
    fn wrong_combinations_are_told_in_a_sentence_each() {
        let mut settings = of("s3://bucket");
        settings.directory = Some("blobs".into());
        settings.access_key_id = Some("key".to_owned());
        settings.endpoint = Some("127.0.0.1:9000".to_owned());
        settings.timeout = Duration::ZERO;
        let problems = settings.check().unwrap_err();
        assert_eq!(problems.len(), 4, "{problems:#?}");
        let alone = Settings { endpoint: Some("http://a".to_owned()), ..Settings::default() };
        let problems = alone.check().unwrap_err();
        assert!(problems[0].contains("without `blobs.url`"), "{problems:?}");
        Settings::default().check().unwrap();
    }
}
