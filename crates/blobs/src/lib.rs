//! `Blobs` in a directory, and in object storage that speaks S3.
//!
//! Both keep a checksum of every content beside it and verify it whenever the whole is read. Neither shows a blob
//! before it is whole and durable: a directory by a rename, object storage by one request or by the completion of an
//! upload in parts.
//!
//! Start reading at [`DirectoryBlobs`] and [`S3Blobs`]. It may import `fieldline-contracts`, `fieldline-model` and nothing
//! else of the workspace, and alone imports `object_store`.

mod checksum;
mod directory;
mod remedy;
mod s3;
mod settings;
mod upload;

pub use directory::DirectoryBlobs;
pub use s3::S3Blobs;
pub use settings::{Place, Settings};

/// Why blobs cannot be used as configured, in one sentence that says what and how to mend it. It names no secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct OpenError(String);
