//! Any text as the key of a blob: what is taken is written as it was read, and never leaves its account.
#![no_main]

use fieldline_contracts::{BlobFolder, BlobKey};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(key) = BlobKey::parse(text) {
        assert_eq!(key.as_str(), text);
        assert!(!text.contains("..") || text.split('/').all(|part| part != ".."));
        let all = match key.account() {
            Some(account) => BlobFolder::of(account, "").expect("all of an account"),
            None => BlobFolder::shared("").expect("all of the installation"),
        };
        assert!(all.holds(&key));
    }
    if let Ok(key) = BlobKey::shared(text) {
        assert_eq!(BlobKey::parse(key.as_str()), Ok(key));
    }
});
