//! What the storage's refusals mean, in words that name the remedy.

use std::error::Error as StdError;

/// Most bytes of an answer that are repeated.
const ANSWER_BYTES_MAX: usize = 300;

/// What is wrong, as far as the answer tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// Nobody answers there, or not in time.
    Away,
    /// The key or its secret is wrong.
    Key,
    /// No key is set, and the machine has none either.
    NoKey,
    /// The key is right, and may not do this.
    Rights,
    /// There is no such bucket.
    Bucket,
    /// The bucket is elsewhere.
    Region,
    /// The clocks differ.
    Clock,
    /// There is no such object.
    Missing,
    /// The object is not as the condition wants it.
    Condition,
    /// The range begins behind the end.
    Range,
    /// Anything else.
    Other,
}

impl Cause {
    /// Whether it may pass by itself.
    pub(crate) const fn is_lasting(self) -> bool {
        matches!(self, Self::Key | Self::NoKey | Self::Rights | Self::Region)
    }
}

/// The text between `<tag>` and `</tag>`.
fn between<'a>(text: &'a str, tag: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("<{tag}>"))?;
    Some(rest.split_once(&format!("</{tag}>"))?.0)
}

/// Reads an error of the client.
pub(crate) fn cause(error: &object_store::Error) -> Cause {
    let text = chain(error);
    if let Some(code) = between(&text, "Code") {
        match code {
            "InvalidAccessKeyId"
            | "SignatureDoesNotMatch"
            | "NotSignedUp"
            | "InvalidToken"
            | "ExpiredToken" => return Cause::Key,
            "AccessDenied" | "AllAccessDisabled" | "AccountProblem" => return Cause::Rights,
            "NoSuchBucket" => return Cause::Bucket,
            "PermanentRedirect"
            | "AuthorizationHeaderMalformed"
            | "IllegalLocationConstraintException" => {
                return Cause::Region;
            }
            "RequestTimeTooSkewed" => return Cause::Clock,
            "InvalidRange" => return Cause::Range,
            // Another write of the object is going on: how that ends is not known yet.
            "ConditionalRequestConflict" | "OperationAborted" => return Cause::Other,
            _ => {}
        }
    }
    // Where it asks a cloud for a key that is not set.
    if text.contains("169.254.") {
        return Cause::NoKey;
    }
    match error {
        object_store::Error::NotFound { .. } => Cause::Missing,
        object_store::Error::Precondition { .. }
        | object_store::Error::AlreadyExists { .. }
        | object_store::Error::NotModified { .. } => Cause::Condition,
        object_store::Error::PermissionDenied { .. } => Cause::Rights,
        object_store::Error::Unauthenticated { .. } => Cause::Key,
        _ if text.contains("without LOCATION") => Cause::Region,
        _ if text.contains("416 Range Not Satisfiable") => Cause::Range,
        _ if ["error sending request", "timed out", "connection", "Connect"]
            .iter()
            .any(|mark| text.contains(mark)) =>
        {
            Cause::Away
        }
        _ => Cause::Other,
    }
}

/// The error and all that it came from, each once.
fn chain(error: &object_store::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = error.source();
    }
    text
}

/// What went wrong, in few words: what the storage said, or the innermost reason.
pub(crate) fn words(error: &object_store::Error) -> String {
    let text = chain(error);
    let said = match (between(&text, "Code"), between(&text, "Message")) {
        (Some(code), Some(message)) if !message.is_empty() => format!("{code}: {message}"),
        (Some(code), _) => code.to_owned(),
        (None, _) => {
            let mut inner: &dyn StdError = error;
            while let Some(source) = inner.source() {
                inner = source;
            }
            inner.to_string()
        }
    };
    let end = said.char_indices().map(|(at, _)| at).find(|at| *at >= ANSWER_BYTES_MAX);
    end.and_then(|end| said.get(..end)).unwrap_or(&said).to_owned()
}

/// The sentence that ends a start.
pub(crate) fn sentence(error: &object_store::Error, address: &str, bucket: &str) -> String {
    let said = words(error);
    match cause(error) {
        Cause::Away => format!(
            "the object storage at {address} (blobs.endpoint) cannot be reached: {said}; check the address, and that it runs"
        ),
        Cause::Key => format!(
            "the object storage at {address} does not accept the key: {said}; check blobs.access_key_id and blobs.secret_access_key"
        ),
        Cause::NoKey => format!(
            "there is no key for the object storage at {address}: set blobs.access_key_id and blobs.secret_access_key, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ),
        Cause::Rights => format!(
            "the key may not use the bucket `{bucket}` at {address}: {said}; allow it s3:ListBucket, s3:GetObject, s3:PutObject, s3:DeleteObject and s3:AbortMultipartUpload"
        ),
        Cause::Bucket => format!(
            "there is no bucket `{bucket}` at {address}: make it, or name another in blobs.url"
        ),
        Cause::Region => format!(
            "the bucket `{bucket}` is in another region: {said}; set blobs.region to the bucket's"
        ),
        Cause::Clock => format!(
            "the clocks of this machine and of the object storage at {address} differ too much: set both by NTP"
        ),
        Cause::Missing | Cause::Condition | Cause::Range | Cause::Other => format!(
            "the object storage at {address} (blobs.endpoint) refuses what is needed: {said}; check that it speaks S3"
        ),
    }
}
