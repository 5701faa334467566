//! `fieldline certificates`: a private authority for the nodes of a cluster, and the certificates that it issues.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};
use fieldline_contracts::{Clock as _, SystemClock};
use fieldline_runtime::mutual_tls::{MutualTlsFiles, ReloadingMutualTls};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};

use crate::protocol::print;

/// The name of the authority. What is issued names it, so it is the same each time.
const AUTHORITY: &str = "Fieldline nodes";
/// Clocks of machines may be apart by this much.
const SKEW: Duration = Duration::from_secs(3_600);
const DAY: Duration = Duration::from_secs(86_400);

/// What to do with certificates.
#[derive(Debug, Subcommand)]
pub(crate) enum CertificatesCommand {
    /// Make an authority: `ca.pem`, which every node needs, and `ca.key`, which none needs and nobody may have
    NewCa {
        #[command(flatten)]
        to: Folder,
        /// Days that it is valid
        #[arg(long, value_name = "N", default_value_t = 3_650, value_parser = clap::value_parser!(u32).range(1..=36_500))]
        days: u32,
    },
    /// Issue the certificate of a node: `NAME.pem` and `NAME.key`; again, to renew it with the same key
    Issue {
        /// The node's name, as `node.name` in its configuration says
        #[arg(long, value_name = "NAME")]
        name: String,
        #[command(flatten)]
        to: Folder,
        /// Days that it is valid; a running node takes up a renewed one by itself
        #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=36_500))]
        days: u32,
    },
}

/// Where files are.
#[derive(Debug, Args)]
pub(crate) struct Folder {
    /// Where the files of the authority are, and new ones are put; created if missing
    #[arg(long = "folder", value_name = "DIR", default_value = "certificates")]
    folder: PathBuf,
}

/// Does it.
///
/// # Errors
///
/// A sentence that says what and how to mend it.
pub(crate) fn run(command: CertificatesCommand) -> Result<(), String> {
    match command {
        CertificatesCommand::NewCa { to, days } => new_ca(&to.folder, days),
        CertificatesCommand::Issue { name, to, days } => issue(&to.folder, &name, days),
    }
}

fn new_ca(folder: &Path, days: u32) -> Result<(), String> {
    let (certificate, key_file) = (folder.join("ca.pem"), folder.join("ca.key"));
    for file in [&certificate, &key_file] {
        if file.exists() {
            return Err(format!(
                "`{}` is there already: what was issued by it would be refused under a new authority; name another folder, or move it away",
                file.display()
            ));
        }
    }
    make_folder(folder)?;
    let key = KeyPair::generate().map_err(failed)?;
    let made = authority(days)?.self_signed(&key).map_err(failed)?;
    write(&key_file, &key.serialize_pem())?;
    write(&certificate, &made.pem())?;
    print(&format!(
        "{}: give it to every node, as node.ca\n{}: keep it to yourself, away from the nodes\n",
        certificate.display(),
        key_file.display(),
    ))
}

fn issue(folder: &Path, name: &str, days: u32) -> Result<(), String> {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let is_number = name.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    if name.len() > 128 || !name.split('.').all(is_label) || is_number || name == "ca" {
        return Err(format!(
            "`{name}` cannot be the name in a certificate: use a-z, 0-9, `-` and `.`, such as node-1, and the same as node.name"
        ));
    }
    let key_of_ca = folder.join("ca.key");
    let text = std::fs::read_to_string(&key_of_ca).map_err(|error| {
        format!(
            "cannot read `{}`: {error}; make an authority with `fieldline certificates new-ca`, or name its folder with --folder",
            key_of_ca.display()
        )
    })?;
    let unreadable = |path: &Path, error: rcgen::Error| {
        format!("`{}` holds no private key: {error}", path.display())
    };
    let key = KeyPair::from_pem(&text).map_err(|error| unreadable(&key_of_ca, error))?;
    // What a certificate says of who issued it depends on the name and the key alone.
    let issuer = Issuer::new(authority(1)?, key);
    let files = MutualTlsFiles {
        ca: folder.join("ca.pem"),
        certificate: folder.join(format!("{name}.pem")),
        key: folder.join(format!("{name}.key")),
    };
    let key = match std::fs::read_to_string(&files.key) {
        Ok(text) => KeyPair::from_pem(&text).map_err(|error| unreadable(&files.key, error))?,
        Err(_) => {
            let key = KeyPair::generate().map_err(failed)?;
            write(&files.key, &key.serialize_pem())?;
            key
        }
    };
    let mut params = CertificateParams::new(vec![name.to_owned()]).map_err(failed)?;
    params.distinguished_name = named(name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    valid(&mut params, days);
    let made = params.signed_by(&key, &issuer).map_err(failed)?;
    write(&files.certificate, &made.pem())?;
    // As a node judges it.
    ReloadingMutualTls::load(files.clone(), name, &[]).map_err(|error| error.to_string())?;
    print(&format!(
        "{}: node.certificate of {name}\n{}: node.key of {name}\n",
        files.certificate.display(),
        files.key.display(),
    ))
}

fn authority(days: u32) -> Result<CertificateParams, String> {
    let mut params = CertificateParams::new(Vec::new()).map_err(failed)?;
    params.distinguished_name = named(AUTHORITY);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid(&mut params, days);
    Ok(params)
}

fn named(name: &str) -> DistinguishedName {
    let mut named = DistinguishedName::new();
    named.push(DnType::CommonName, name);
    named
}

fn valid(params: &mut CertificateParams, days: u32) {
    let now = u64::try_from(SystemClock.now().as_micros()).unwrap_or(0);
    let now = SystemTime::UNIX_EPOCH + Duration::from_micros(now);
    params.not_before = (now - SKEW).into();
    params.not_after = (now + DAY * days).into();
}

fn failed(error: rcgen::Error) -> String {
    format!("the certificate cannot be made: {error}")
}

fn make_folder(folder: &Path) -> Result<(), String> {
    std::fs::create_dir_all(folder)
        .map_err(|error| format!("cannot make the folder `{}`: {error}", folder.display()))
}

/// Puts a file in place whole, readable by its owner alone: a node that looks at it meanwhile sees the one before.
fn write(path: &Path, text: &str) -> Result<(), String> {
    let beside = path.with_extension("new");
    let put = || {
        let mut options = OpenOptions::new();
        // One that a run before left behind may have other rights.
        let _absent = std::fs::remove_file(&beside);
        let mut file = options.write(true).create_new(true).mode(0o600).open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&beside, path)
    };
    put().map_err(|error: std::io::Error| format!("cannot write `{}`: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_node_can_use_what_was_issued_and_renewed() {
        let folder = tempfile::tempdir().unwrap();
        let missing = issue(folder.path(), "node-1", 1).unwrap_err();
        assert!(missing.contains("new-ca"), "{missing}");
        new_ca(folder.path(), 10).unwrap();
        assert!(new_ca(folder.path(), 10).unwrap_err().contains("is there already"));
        issue(folder.path(), "node-1", 10).unwrap();
        let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
        let (key, certificate) = (read("node-1.key"), read("node-1.pem"));
        issue(folder.path(), "node-1", 20).unwrap();
        assert_eq!(key, read("node-1.key"), "the key stays");
        assert_ne!(certificate, read("node-1.pem"));
        for file in std::fs::read_dir(folder.path()).unwrap() {
            let file = file.unwrap();
            let mode = file.metadata().unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, 0o600, "{}", file.path().display());
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 4);
    }

    #[test]
    fn a_certificate_has_a_plain_name() {
        let folder = tempfile::tempdir().unwrap();
        new_ca(folder.path(), 10).unwrap();
        for name in ["", "ca", "../node", "node 1", "Node-1", "node_1", "10.0.0.1", "-a", "a..b"] {
            let said = issue(folder.path(), name, 1).unwrap_err();
            assert!(said.contains("cannot be the name"), "{name}: {said}");
        }
        issue(folder.path(), "node-1.west.example", 1).unwrap();
    }

    #[test]
    fn another_authority_is_noticed_when_it_issues() {
        let folder = tempfile::tempdir().unwrap();
        new_ca(folder.path(), 10).unwrap();
        let other = KeyPair::generate().unwrap();
        write(&folder.path().join("ca.key"), &other.serialize_pem()).unwrap();
        let said = issue(folder.path(), "node-1", 1).unwrap_err();
        assert!(said.contains("ca.pem"), "{said}");
    }
}
