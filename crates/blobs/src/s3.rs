//! Blobs in a bucket of object storage that speaks S3.
//!
//! An object is the content and nothing else; its checksum is metadata, set by the same request. What is small is one
//! request, what is large an upload in parts that is seen only when it is completed. Requests that may be repeated are;
//! a write under a condition that may have been carried out is recognised by a number of its own in the metadata.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use fieldline_contracts::blobs::{
    CONDITIONAL_BYTES_MAX, LIST_MAX, check_range, check_size, check_wanted,
};
use fieldline_contracts::{
    BlobError, BlobFolder, BlobInfo, BlobKey, BlobPage, BlobSource, Blobs, ETag, PutIf,
};
use fieldline_model::Timestamp;
use futures_util::StreamExt as _;
use object_store::aws::{AmazonS3, AmazonS3Builder, S3ConditionalPut};
use object_store::list::{PaginatedListOptions, PaginatedListStore as _};
use object_store::path::Path;
use object_store::{
    Attribute, Attributes, BackoffConfig, Certificate, ClientOptions, GetOptions, GetRange,
    GetResult, ObjectMeta, ObjectStore as _, ObjectStoreExt as _, PutMode, PutMultipartOptions,
    PutOptions, PutPayload, RetryConfig, UpdateVersion,
};
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};

use crate::OpenError;
use crate::checksum::{self, Hasher, SourceFile};
use crate::remedy::{self, Cause};
use crate::settings::{Place, Settings, host};
use crate::upload::Upload;

/// Bytes of one part of an upload. 10,000 parts are possible, so [`BLOB_BYTES_MAX`] fits well.
///
/// [`BLOB_BYTES_MAX`]: fieldline_contracts::blobs::BLOB_BYTES_MAX
const PART_BYTES: usize = 8 << 20;
/// Parts of an upload that are sent at once.
const PARTS_AT_ONCE: usize = 3;
/// Blobs that are sent at once; further ones wait. Each holds at most 24 MiB.
const PUTS_AT_ONCE: usize = 4;
/// Longest that a connection may take.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Longest that a look whether the storage is there may take.
const LOOK_MAX: Duration = Duration::from_secs(10);

/// Metadata with the checksum of the content.
const HASH: &str = "fieldline-xxh3";
/// Metadata with the number of the write.
const WRITE: &str = "fieldline-write";

/// Blobs in a bucket.
pub struct S3Blobs {
    inner: Arc<Inner>,
    look: JoinHandle<()>,
}

struct Inner {
    store: AmazonS3,
    /// Tries nothing twice: for looks.
    once: AmazonS3,
    bucket: String,
    /// Before all keys; empty, or ends with `/`.
    prefix: String,
    /// Where the storage is, for messages.
    address: String,
    puts: Semaphore,
    /// What went wrong last, until it goes well.
    problem: Mutex<Option<String>>,
}

fn client(settings: &Settings, bucket: &str, retries: bool) -> Result<AmazonS3, OpenError> {
    let timeout = if retries { settings.timeout } else { LOOK_MAX.min(settings.timeout) };
    let mut options =
        ClientOptions::new().with_timeout(timeout).with_connect_timeout(CONNECT_MAX.min(timeout));
    if let Some(path) = &settings.tls_ca {
        let pem = std::fs::read(path).map_err(|error| {
            OpenError(format!("blobs.tls_ca: cannot read `{}`: {error}", path.display()))
        })?;
        let certificates = Certificate::from_pem_bundle(&pem).unwrap_or_default();
        if certificates.is_empty() {
            return Err(OpenError(format!(
                "blobs.tls_ca: `{}` has no certificate in PEM form",
                path.display()
            )));
        }
        for certificate in certificates {
            options = options.with_root_certificate(certificate);
        }
    }
    let retry = RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(3),
            base: 2.0,
        },
        max_retries: if retries { 10 } else { 0 },
        retry_timeout: if retries { settings.retry_for } else { Duration::ZERO },
    };
    let from_settings = settings.access_key_id.clone().zip(settings.secret_access_key.clone());
    let mut builder = match from_settings {
        Some((key, secret)) => {
            AmazonS3Builder::new().with_access_key_id(key).with_secret_access_key(secret)
        }
        None => AmazonS3Builder::from_env(),
    };
    let path_style = settings.path_style.unwrap_or(settings.endpoint.is_some());
    builder = builder
        .with_client_options(options)
        .with_retry(retry)
        .with_bucket_name(bucket)
        .with_region(&settings.region)
        .with_virtual_hosted_style_request(!path_style)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_disable_bulk_delete(true);
    if let Some(endpoint) = &settings.endpoint {
        let plain = endpoint.starts_with("http://");
        let scheme = if plain { "http" } else { "https" };
        let host = host(endpoint).unwrap_or_default();
        let at = if path_style { host.to_owned() } else { format!("{bucket}.{host}") };
        builder = builder.with_endpoint(format!("{scheme}://{at}")).with_allow_http(plain);
    }
    builder.build().map_err(|error| {
        OpenError(format!(
            "the object storage cannot be used as configured: {error}; check `[blobs]`"
        ))
    })
}

impl S3Blobs {
    /// Connects, and tries whether all that is needed can be done: list, write, write under a condition, read, delete.
    ///
    /// # Errors
    ///
    /// [`OpenError`]: the settings are wrong, or the storage is away or not fit.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub async fn connect(settings: &Settings) -> Result<Self, OpenError> {
        settings.check().map_err(|problems| OpenError(problems.join("; ")))?;
        let Some(Place::Bucket { bucket, prefix }) = settings.place() else {
            return Err(OpenError(
                "`blobs.url` is missing: name the bucket, s3://BUCKET".to_owned(),
            ));
        };
        // Else the program has chosen one already.
        if rustls::crypto::aws_lc_rs::default_provider().install_default().is_ok() {
            tracing::debug!("TLS to object storage by aws-lc-rs");
        }
        let (store, once) = (client(settings, &bucket, true)?, client(settings, &bucket, false)?);
        let address = match &settings.endpoint {
            Some(endpoint) => endpoint.clone(),
            None => format!("AWS, {}", settings.region),
        };
        let inner = Arc::new(Inner {
            store,
            once,
            bucket,
            prefix,
            address,
            puts: Semaphore::new(PUTS_AT_ONCE),
            problem: Mutex::new(None),
        });
        let tried = tokio::time::timeout(2 * LOOK_MAX, inner.try_all()).await;
        tried.unwrap_or_else(|_| {
            Err(OpenError(format!(
                "the object storage at {} (blobs.endpoint) does not answer in time: check the address, and that it runs",
                inner.address
            )))
        })?;
        let look = tokio::spawn(look(Arc::clone(&inner), settings.look_every));
        Ok(Self { inner, look })
    }
}

impl Drop for S3Blobs {
    fn drop(&mut self) {
        self.look.abort();
    }
}

/// Looks whether the storage is there, also while nobody uses it.
async fn look(inner: Arc<Inner>, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        if let Err(error) = inner.list_some().await {
            let error = inner.error(None, &error);
            tracing::debug!(%error, "object storage");
        } else {
            *inner.problem.lock() = None;
        }
    }
}

impl Inner {
    fn path(&self, key: &BlobKey) -> Result<Path, BlobError> {
        let path = Path::parse(format!("{}{key}", self.prefix));
        path.map_err(|error| BlobError::Refused(format!("`{key}` cannot be an object: {error}")))
    }

    async fn list_some(&self) -> Result<(), object_store::Error> {
        let options = PaginatedListOptions { max_keys: Some(1), ..Default::default() };
        self.once.list_paginated(Some(&self.prefix), options).await.map(|_| ())
    }

    /// Does once what will be done.
    async fn try_all(&self) -> Result<(), OpenError> {
        let wrong = |error: object_store::Error| {
            OpenError(remedy::sentence(&error, &self.address, &self.bucket))
        };
        self.list_some().await.map_err(wrong)?;
        let path = Path::from(format!("{}probe-{:016x}", self.prefix, rand::random::<u64>()));
        let content = || PutPayload::from_static(b"fieldline");
        let when = |mode| PutOptions { mode, ..PutOptions::default() };
        let conditional = |what: &str| {
            OpenError(format!(
                "the object storage at {} does not keep the condition {what} of writes: use one that does, such as AWS S3, MinIO, Ceph or Garage of a newer version",
                self.address
            ))
        };
        let put =
            self.once.put_opts(&path, content(), when(PutMode::Create)).await.map_err(wrong)?;
        let tried = async {
            match self.once.put_opts(&path, content(), when(PutMode::Create)).await {
                Ok(_) => return Err(conditional("If-None-Match")),
                Err(error) if remedy::cause(&error) == Cause::Condition => {}
                Err(error) => return Err(wrong(error)),
            }
            let other = UpdateVersion { e_tag: Some("\"another\"".to_owned()), version: None };
            match self.once.put_opts(&path, content(), when(PutMode::Update(other))).await {
                Ok(_) => return Err(conditional("If-Match")),
                Err(error) if remedy::cause(&error) == Cause::Condition => {}
                Err(error) => return Err(wrong(error)),
            }
            let meta = self.once.head(&path).await.map_err(wrong)?;
            if put.e_tag.is_none() || meta.e_tag != put.e_tag {
                return Err(conditional("ETag"));
            }
            Ok(())
        };
        let tried = tried.await;
        let deleted = self.once.delete(&path).await.map_err(wrong);
        tried.and(deleted)
    }

    /// What an error means to a caller; notes it where it is the storage's.
    fn error(&self, key: Option<&BlobKey>, error: &object_store::Error) -> BlobError {
        let cause = remedy::cause(error);
        if let (Cause::Missing, Some(key)) = (cause, key) {
            return BlobError::NotFound(key.clone());
        }
        let text = match cause {
            Cause::Away => format!("{} does not answer: {}", self.address, remedy::words(error)),
            Cause::Other | Cause::Missing | Cause::Condition | Cause::Range => {
                format!("{} fails: {}", self.address, remedy::words(error))
            }
            _ => remedy::sentence(error, &self.address, &self.bucket),
        };
        *self.problem.lock() = Some(text.clone());
        if cause.is_lasting() { BlobError::Refused(text) } else { BlobError::Unavailable(text) }
    }

    fn well<T>(
        &self,
        operation: &'static str,
        began: Instant,
        result: Result<T, BlobError>,
    ) -> Result<T, BlobError> {
        let label = match &result {
            Ok(_) => "ok",
            Err(error) => error.code(),
        };
        metrics::histogram!("fieldline_blobs_seconds", "operation" => operation, "result" => label)
            .record(began.elapsed());
        // Whatever it said of one blob, it answered.
        let answered = !matches!(result, Err(BlobError::Unavailable(_) | BlobError::Refused(_)));
        if answered {
            *self.problem.lock() = None;
        }
        result
    }

    async fn put(&self, key: &BlobKey, source: BlobSource, when: PutIf) -> Result<ETag, BlobError> {
        let path = self.path(key)?;
        let closed = |_| BlobError::Unavailable("object storage is closed".to_owned());
        let _turn = self.puts.acquire().await.map_err(closed)?;
        match source {
            BlobSource::Bytes(bytes) => {
                check_size(key, bytes.len() as u64, &when)?;
                let hash = checksum::of(&bytes);
                if bytes.len() as u64 <= CONDITIONAL_BYTES_MAX {
                    return self.put_once(key, &path, bytes, hash, when).await;
                }
                let mut left = bytes;
                let mut next = move || {
                    let part = left.split_to(PART_BYTES.min(left.len()));
                    std::future::ready(Ok((!part.is_empty()).then_some(part)))
                };
                self.put_parts(key, &path, &hash, &mut next).await
            }
            BlobSource::File(file) => {
                let (key_of, when_of, file_of) = (key.clone(), when.clone(), file.clone());
                // Small ones are kept from the first reading.
                let first = move || {
                    let mut source = SourceFile::open(&key_of, &file_of, &when_of)?;
                    let (mut hasher, mut kept) = (Hasher::new(), Vec::new());
                    let small = source.size_bytes <= CONDITIONAL_BYTES_MAX;
                    source.each(|bytes| {
                        hasher.update(bytes);
                        if small {
                            kept.extend_from_slice(bytes);
                        }
                        Ok(())
                    })?;
                    Ok((hasher, small.then_some(kept)))
                };
                let (hasher, kept) = blocking(first).await?;
                let hash = hasher.finish();
                if let Some(bytes) = kept {
                    return self.put_once(key, &path, bytes.into(), hash, when).await;
                }
                let (key_of, when_of) = (key.clone(), when.clone());
                let source = blocking(move || SourceFile::open(&key_of, &file, &when_of)).await?;
                let size = source.size_bytes;
                let state = Arc::new(Mutex::new((source, Hasher::new())));
                let expected = hash.clone();
                let mut next = move || {
                    let (state, expected) = (Arc::clone(&state), expected.clone());
                    blocking(move || {
                        let (source, hasher) = &mut *state.lock();
                        let part = source.next(PART_BYTES)?;
                        hasher.update(&part);
                        let whole = part.is_empty() || hasher.size_bytes >= size;
                        if hasher.size_bytes > size || (whole && hasher.finish() != expected) {
                            return Err(source.changed());
                        }
                        Ok((!part.is_empty()).then(|| Bytes::from(part)))
                    })
                };
                self.put_parts(key, &path, &hash, &mut next).await
            }
        }
    }

    /// Stores a blob by one request.
    async fn put_once(
        &self,
        key: &BlobKey,
        path: &Path,
        bytes: Bytes,
        hash: String,
        when: PutIf,
    ) -> Result<ETag, BlobError> {
        let number = format!("{:016x}", rand::random::<u64>());
        let mode = match &when {
            PutIf::Any => PutMode::Overwrite,
            PutIf::Absent => PutMode::Create,
            PutIf::Is(etag) => {
                PutMode::Update(UpdateVersion { e_tag: Some(etag.0.clone()), version: None })
            }
        };
        let options =
            PutOptions { mode, attributes: attributes(&hash, &number), ..PutOptions::default() };
        let put = self.store.put_opts(path, PutPayload::from_bytes(bytes), options).await;
        let error = match put {
            Ok(put) => return self.etag(key, put.e_tag),
            Err(error) => error,
        };
        let conflict = match (&when, remedy::cause(&error)) {
            (PutIf::Any, _) => return Err(self.error(None, &error)),
            (PutIf::Absent, Cause::Condition) => BlobError::AlreadyExists(key.clone()),
            // One that is gone is answered so by some.
            (PutIf::Is(_), Cause::Condition | Cause::Missing) => BlobError::Changed(key.clone()),
            _ => return Err(self.error(None, &error)),
        };
        // It may be ours: the first answer was lost, and the request repeated.
        match self.written(path, &number).await {
            Ok(Some(etag)) => self.etag(key, Some(etag)),
            Ok(None) => Err(conflict),
            Err(error) => Err(self.error(None, &error)),
        }
    }

    /// Stores a blob by an upload in parts, which `next` gives.
    async fn put_parts<F: Future<Output = Result<Option<Bytes>, BlobError>>>(
        &self,
        key: &BlobKey,
        path: &Path,
        hash: &str,
        next: &mut (impl FnMut() -> F + Send),
    ) -> Result<ETag, BlobError> {
        let number = format!("{:016x}", rand::random::<u64>());
        let options = PutMultipartOptions {
            attributes: attributes(hash, &number),
            ..PutMultipartOptions::default()
        };
        let begun = self.store.put_multipart_opts(path, options).await;
        let begun = begun.map_err(|error| self.error(None, &error))?;
        let mut upload = Upload { upload: Some(begun), address: self.address.clone() };
        let completed = match self.send_parts(&mut upload, next).await {
            Ok(()) => match &mut upload.upload {
                Some(upload) => upload.complete().await,
                None => return Err(BlobError::Unavailable("the upload has ended".to_owned())),
            },
            Err(error) => {
                upload.abort().await;
                return Err(error);
            }
        };
        let error = match completed {
            Ok(put) => {
                upload.upload = None;
                return self.etag(key, put.e_tag);
            }
            Err(error) => error,
        };
        // The answer may have been lost, or the request repeated after it was carried out.
        match self.written(path, &number).await {
            Ok(Some(etag)) => {
                upload.upload = None;
                self.etag(key, Some(etag))
            }
            _ => {
                let error = self.error(None, &error);
                upload.abort().await;
                Err(error)
            }
        }
    }

    async fn send_parts<F: Future<Output = Result<Option<Bytes>, BlobError>>>(
        &self,
        upload: &mut Upload,
        next: &mut (impl FnMut() -> F + Send),
    ) -> Result<(), BlobError> {
        let mut sending: JoinSet<Result<(), object_store::Error>> = JoinSet::new();
        let sent =
            |done: Result<Result<(), object_store::Error>, tokio::task::JoinError>| match done {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => Err(self.error(None, &error)),
                Err(error) => Err(BlobError::Unavailable(error.to_string())),
            };
        let result = async {
            while let Some(part) = next().await? {
                if sending.len() >= PARTS_AT_ONCE
                    && let Some(done) = sending.join_next().await
                {
                    sent(done)?;
                }
                if let Some(upload) = &mut upload.upload {
                    sending.spawn(upload.put_part(PutPayload::from_bytes(part)));
                }
            }
            while let Some(done) = sending.join_next().await {
                sent(done)?;
            }
            Ok(())
        };
        let result = result.await;
        // A part that arrives after the abort would stay.
        sending.shutdown().await;
        result
    }

    /// The etag of the object, if it is the one of the write `number`.
    async fn written(
        &self,
        path: &Path,
        number: &str,
    ) -> Result<Option<String>, object_store::Error> {
        let options = GetOptions { head: true, ..GetOptions::default() };
        match self.store.get_opts(path, options).await {
            Ok(found) => {
                let ours = metadata(&found, WRITE) == Some(number);
                Ok(found.meta.e_tag.filter(|_| ours))
            }
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn etag(&self, key: &BlobKey, etag: Option<String>) -> Result<ETag, BlobError> {
        etag.map(ETag).ok_or_else(|| {
            BlobError::Unavailable(format!("{} told no ETag of `{key}`", self.address))
        })
    }

    fn info(&self, key: &BlobKey, meta: &ObjectMeta) -> BlobInfo {
        BlobInfo {
            key: key.clone(),
            size_bytes: meta.size,
            etag: ETag(meta.e_tag.clone().unwrap_or_default()),
            modified: Timestamp::from_micros(meta.last_modified.timestamp_micros()),
        }
    }

    async fn get(&self, key: &BlobKey, bytes_max: u64) -> Result<(BlobInfo, Bytes), BlobError> {
        let found = self.store.get_opts(&self.path(key)?, GetOptions::default()).await;
        let found = found.map_err(|error| self.error(Some(key), &error))?;
        let info = self.info(key, &found.meta);
        check_wanted(key, info.size_bytes, bytes_max)?;
        let damaged =
            |reason: &str| BlobError::Damaged { key: key.clone(), reason: reason.to_owned() };
        let Some(expected) = metadata(&found, HASH).map(str::to_owned) else {
            return Err(damaged(
                "it has no checksum, so it was not written by us or lost its metadata",
            ));
        };
        let size = usize::try_from(info.size_bytes).unwrap_or(usize::MAX);
        let (mut all, mut hasher) = (BytesMut::new(), Hasher::new());
        let mut stream = found.into_stream();
        while let Some(bytes) = stream.next().await {
            let bytes = bytes.map_err(|error| self.error(Some(key), &error))?;
            hasher.update(&bytes);
            all.extend_from_slice(&bytes);
            if all.len() > size {
                return Err(damaged("more bytes came than its size"));
            }
        }
        if hasher.size_bytes != info.size_bytes || hasher.finish() != expected {
            return Err(damaged("its bytes do not have the checksum they were written with"));
        }
        Ok((info, all.freeze()))
    }

    async fn get_range(
        &self,
        key: &BlobKey,
        range: Range<u64>,
    ) -> Result<(BlobInfo, Bytes), BlobError> {
        if check_range(key, &range)? == 0 {
            return Ok((self.head(key).await?, Bytes::new()));
        }
        let options =
            GetOptions { range: Some(GetRange::Bounded(range.clone())), ..GetOptions::default() };
        let found = match self.store.get_opts(&self.path(key)?, options).await {
            Ok(found) => found,
            Err(error) if remedy::cause(&error) == Cause::Range => {
                return Ok((self.head(key).await?, Bytes::new()));
            }
            Err(error) => return Err(self.error(Some(key), &error)),
        };
        let info = self.info(key, &found.meta);
        let wanted = range.end.min(info.size_bytes).saturating_sub(range.start);
        let bytes = found.bytes().await.map_err(|error| self.error(Some(key), &error))?;
        if bytes.len() as u64 != wanted {
            let text = format!("{} sent {} of {wanted} bytes", self.address, bytes.len());
            return Err(BlobError::Unavailable(text));
        }
        Ok((info, bytes))
    }

    async fn head(&self, key: &BlobKey) -> Result<BlobInfo, BlobError> {
        match self.store.head(&self.path(key)?).await {
            Ok(meta) => Ok(self.info(key, &meta)),
            Err(error) => {
                let error = self.error(Some(key), &error);
                // Its answer has no body, so it does not say whether the bucket is there.
                if matches!(error, BlobError::NotFound(_)) {
                    self.list_some().await.map_err(|error| self.error(None, &error))?;
                }
                Err(error)
            }
        }
    }

    async fn list(
        &self,
        folder: &BlobFolder,
        after: Option<&BlobKey>,
        limit: usize,
    ) -> Result<BlobPage, BlobError> {
        let limit = limit.clamp(1, LIST_MAX);
        let prefix = format!("{}{}", self.prefix, folder.as_str());
        let mut offset = after.map(|key| format!("{}{key}", self.prefix));
        let mut page = BlobPage::default();
        loop {
            let options = PaginatedListOptions {
                offset: offset.clone(),
                max_keys: Some(limit - page.blobs.len()),
                ..PaginatedListOptions::default()
            };
            let listed = self.store.list_paginated(Some(&prefix), options).await;
            let listed = listed.map_err(|error| self.error(None, &error))?;
            let objects = listed.result.objects;
            for meta in &objects {
                // What is no key of ours is somebody else's.
                let key = meta.location.as_ref().strip_prefix(self.prefix.as_str());
                if let Some(key) = key.and_then(|key| BlobKey::parse(key).ok()) {
                    page.blobs.push(self.info(&key, meta));
                }
            }
            if listed.page_token.is_none() {
                return Ok(page);
            }
            if page.blobs.len() >= limit {
                page.next = page.blobs.last().map(|blob| blob.key.clone());
                return Ok(page);
            }
            let Some(last) = objects.last() else { return Ok(page) };
            offset = Some(last.location.to_string());
        }
    }

    async fn delete(&self, key: &BlobKey) -> Result<(), BlobError> {
        match self.store.delete(&self.path(key)?).await {
            Ok(()) => Ok(()),
            Err(error) => match self.error(Some(key), &error) {
                BlobError::NotFound(_) => Ok(()),
                error => Err(error),
            },
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BlobError> + Send + 'static,
) -> Result<T, BlobError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(BlobError::Unavailable(error.to_string())))
}

fn attributes(hash: &str, number: &str) -> Attributes {
    let of = |name: &'static str| Attribute::Metadata(name.into());
    Attributes::from_iter([(of(HASH), hash.to_owned()), (of(WRITE), number.to_owned())])
}

fn metadata<'a>(found: &'a GetResult, name: &'static str) -> Option<&'a str> {
    found.attributes.get(&Attribute::Metadata(name.into())).map(AsRef::as_ref)
}

#[async_trait]
impl Blobs for S3Blobs {
    async fn put(&self, key: &BlobKey, source: BlobSource, when: PutIf) -> Result<ETag, BlobError> {
        let began = Instant::now();
        let put = Box::pin(self.inner.put(key, source, when)).await;
        self.inner.well("put", began, put)
    }

    async fn get(&self, key: &BlobKey, bytes_max: u64) -> Result<(BlobInfo, Bytes), BlobError> {
        let began = Instant::now();
        let got = Box::pin(self.inner.get(key, bytes_max)).await;
        self.inner.well("get", began, got)
    }

    async fn get_range(
        &self,
        key: &BlobKey,
        range: Range<u64>,
    ) -> Result<(BlobInfo, Bytes), BlobError> {
        let began = Instant::now();
        let got = Box::pin(self.inner.get_range(key, range)).await;
        self.inner.well("get_range", began, got)
    }

    async fn head(&self, key: &BlobKey) -> Result<BlobInfo, BlobError> {
        let began = Instant::now();
        let head = self.inner.head(key).await;
        self.inner.well("head", began, head)
    }

    async fn list(
        &self,
        folder: &BlobFolder,
        after: Option<&BlobKey>,
        limit: usize,
    ) -> Result<BlobPage, BlobError> {
        let began = Instant::now();
        let page = Box::pin(self.inner.list(folder, after, limit)).await;
        self.inner.well("list", began, page)
    }

    async fn delete(&self, key: &BlobKey) -> Result<(), BlobError> {
        let began = Instant::now();
        let deleted = self.inner.delete(key).await;
        self.inner.well("delete", began, deleted)
    }

    fn problems(&self) -> Vec<String> {
        self.inner.problem.lock().iter().cloned().collect()
    }
}
