//! Where blobs are kept: a directory beside the other data, or a bucket of object storage.

use std::path::Path;
use std::sync::Arc;

use fieldline_blobs::{DirectoryBlobs, Place, S3Blobs, Settings};
use fieldline_contracts::Blobs;

use crate::worker::{Failure, setup};

/// Those of one process: in `directory`, unless the configuration says otherwise.
pub(crate) async fn of_one(
    settings: &Settings,
    directory: &Path,
) -> Result<Arc<dyn Blobs>, Failure> {
    match settings.place() {
        Some(Place::Bucket { .. }) => bucket(settings).await,
        Some(Place::Directory(other)) => open(&other),
        None => open(directory),
    }
}

/// Those of a node of several: none, unless the configuration names a bucket.
pub(crate) async fn of_cluster(settings: &Settings) -> Result<Option<Arc<dyn Blobs>>, Failure> {
    match settings.place() {
        Some(Place::Bucket { .. }) => bucket(settings).await.map(Some),
        Some(Place::Directory(_)) | None => Ok(None),
    }
}

fn open(directory: &Path) -> Result<Arc<dyn Blobs>, Failure> {
    Ok(Arc::new(DirectoryBlobs::open(directory).map_err(setup)?))
}

async fn bucket(settings: &Settings) -> Result<Arc<dyn Blobs>, Failure> {
    Ok(Arc::new(Box::pin(S3Blobs::connect(settings)).await.map_err(setup)?))
}

/// Checks the section, for a node of several or for one process.
pub(crate) fn check(settings: &Settings, of_several: bool) -> Vec<String> {
    let mut problems = settings.check().err().unwrap_or_default();
    if of_several && settings.directory.is_some() {
        problems.push(
            "`blobs.directory` is of one machine, and this is a node of several: name a bucket, `blobs.url = \"s3://BUCKET\"`, or leave the section out".to_owned(),
        );
    }
    problems
}
