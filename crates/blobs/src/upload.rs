//! An upload in parts, of which nothing stays unless it is completed.

use object_store::MultipartUpload;

use crate::remedy;

/// An upload in parts: aborted when dropped before it is complete.
pub(crate) struct Upload {
    /// `None` when it is complete or aborted.
    pub(crate) upload: Option<Box<dyn MultipartUpload>>,
    /// Where the storage is, for messages.
    pub(crate) address: String,
}

impl Upload {
    /// Gives it up: its parts go.
    pub(crate) async fn abort(&mut self) {
        if let Some(upload) = self.upload.take() {
            abort(upload, &self.address).await;
        }
    }
}

async fn abort(mut upload: Box<dyn MultipartUpload>, address: &str) {
    if let Err(error) = upload.abort().await {
        let reason = remedy::words(&error);
        tracing::warn!(
            address,
            reason,
            "an upload could not be aborted: its parts stay until a rule of the bucket removes them"
        );
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if let (Some(upload), Ok(runtime)) =
            (self.upload.take(), tokio::runtime::Handle::try_current())
        {
            let address = std::mem::take(&mut self.address);
            runtime.spawn(async move { abort(upload, &address).await });
        }
    }
}
