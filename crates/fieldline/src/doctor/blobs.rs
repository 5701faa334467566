//! The place of blobs: a directory, or a bucket of object storage, tried as a start tries it.

use std::sync::Arc;

use fieldline_blobs::{DirectoryBlobs, OpenError, Place, S3Blobs};
use fieldline_contracts::finding::Finding;

use super::Patient;

const CHECK: &str = "blobs";

/// Whether blobs can be written and read; nothing where there is no place for them.
pub(super) async fn place(patient: Arc<Patient>) -> Vec<Finding> {
    let settings = &patient.config.blobs;
    let directory = match (settings.place(), &patient.data) {
        (Some(Place::Bucket { bucket, .. }), _) => {
            let at = settings.endpoint.clone().unwrap_or_else(|| format!("bucket {bucket}"));
            let tried = Box::pin(S3Blobs::connect(settings)).await;
            let found =
                tried.map(|_| format!("the bucket `{bucket}` can be listed, written and read"));
            return vec![finding(at, found)];
        }
        (Some(Place::Directory(directory)), _) => directory,
        (None, Some(data)) if patient.config.node.is_none() => data.join("blobs"),
        (None, _) => return Vec::new(),
    };
    let at = directory.display().to_string();
    vec![finding(at, DirectoryBlobs::look(&directory))]
}

/// The sentence of an error ends with what to do, after a semicolon or, without one, a colon.
fn finding(at: String, found: Result<String, OpenError>) -> Finding {
    match found {
        Ok(found) => Finding::ok(CHECK, at, found),
        Err(error) => {
            let text = error.to_string();
            let split = text.rsplit_once("; ").or_else(|| text.rsplit_once(": "));
            let (found, remedy) = split.unwrap_or((text.as_str(), "check the section `blobs`"));
            Finding::broken(CHECK, at, found, remedy)
        }
    }
}
