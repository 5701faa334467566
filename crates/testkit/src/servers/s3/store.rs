//! Objects in files: a line of JSON, then the content. A file is written, synced and named before anybody hears of it;
//! which file is an object's is decided under a lock, and so are conditions.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use parking_lot::Mutex;
use s3s::dto::{
    AbortMultipartUploadInput, AbortMultipartUploadOutput, CompleteMultipartUploadInput,
    CompleteMultipartUploadOutput, CreateMultipartUploadInput, CreateMultipartUploadOutput,
    DeleteObjectInput, DeleteObjectOutput, ETag, ETagCondition, GetObjectInput, GetObjectOutput,
    HeadObjectInput, HeadObjectOutput, ListObjectsV2Input, ListObjectsV2Output, Object,
    PutObjectInput, PutObjectOutput, StreamingBlob, Timestamp, UploadPartInput, UploadPartOutput,
};
use s3s::{S3, S3Request, S3Response, S3Result, s3_error};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Most bytes of one request.
const BODY_BYTES_MAX: usize = 64 << 20;
/// Fewest bytes of a part that is not the last, as S3 has it.
const PART_BYTES_MIN: u64 = 5 << 20;

type Metadata = HashMap<String, String>;

/// The first line of a file.
#[derive(Clone, Serialize, Deserialize)]
struct Head {
    key: String,
    etag: String,
    metadata: Metadata,
    size: u64,
}

#[derive(Clone)]
struct Entry {
    head: Head,
    number: u64,
    path: PathBuf,
    /// Where the content begins.
    offset: u64,
    modified: SystemTime,
}

#[derive(Default)]
struct Table {
    buckets: BTreeMap<String, BTreeMap<String, Entry>>,
}

pub(super) struct Store {
    folder: PathBuf,
    table: Mutex<Table>,
    numbers: std::sync::atomic::AtomicU64,
}

impl Store {
    /// Reads what is there; what a kill left behind is removed.
    pub(super) fn open(folder: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(folder.join("uploads"))?;
        let mut table = Table::default();
        let mut last = 0;
        for bucket in std::fs::read_dir(folder.join("buckets"))? {
            let bucket = bucket?;
            let mut objects: BTreeMap<String, Entry> = BTreeMap::new();
            for file in std::fs::read_dir(bucket.path())? {
                let path = file?.path();
                let number = path.file_name().and_then(|name| name.to_str()?.parse().ok());
                let Some(number) = number else {
                    std::fs::remove_file(&path)?;
                    continue;
                };
                last = last.max(number);
                let entry = read_entry(path, number)?;
                let older = match objects.get(&entry.head.key) {
                    Some(other) if other.number > number => Some(entry),
                    _ => objects.insert(entry.head.key.clone(), entry),
                };
                if let Some(older) = older {
                    std::fs::remove_file(older.path)?;
                }
            }
            table.buckets.insert(bucket.file_name().to_string_lossy().into_owned(), objects);
        }
        let (table, numbers) = (Mutex::new(table), (last + 1).into());
        Ok(Self { folder: folder.to_owned(), table, numbers })
    }

    fn number(&self) -> u64 {
        self.numbers.fetch_add(1, std::sync::atomic::Ordering::SeqCst)
    }

    /// Stores an object if its condition holds; its content is durable before it is seen.
    fn store(
        &self,
        bucket: &str,
        head: Head,
        content: &mut dyn io::Read,
        if_match: Option<&ETagCondition>,
        if_none_match: Option<&ETagCondition>,
    ) -> S3Result<()> {
        let holds = |table: &Table| {
            let objects = table.buckets.get(bucket).ok_or_else(|| s3_error!(NoSuchBucket))?;
            let present = objects.get(&head.key);
            if if_none_match.is_some_and(ETagCondition::is_any) && present.is_some() {
                return Err(s3_error!(PreconditionFailed, "the object is there already"));
            }
            if let Some(wanted) = if_match {
                let present = present.ok_or_else(|| s3_error!(NoSuchKey))?;
                if wanted.as_etag().is_some_and(|etag| etag.value() != present.head.etag) {
                    return Err(s3_error!(PreconditionFailed, "the object is another"));
                }
            }
            Ok(())
        };
        holds(&self.table.lock())?;
        let number = self.number();
        let folder = self.folder.join("buckets").join(bucket);
        let written = (|| -> io::Result<Entry> {
            let (temporary, path) =
                (folder.join(format!("{number}.new")), folder.join(number.to_string()));
            let mut file = File::create(&temporary)?;
            let mut line = serde_json::to_vec(&head)?;
            line.push(b'\n');
            file.write_all(&line)?;
            io::copy(content, &mut file)?;
            file.sync_all()?;
            // Numbers grow in the order in which objects are replaced: named under the lock below.
            let modified = file.metadata()?.modified()?;
            let offset = line.len() as u64;
            std::fs::rename(temporary, folder.join(format!("{number}.ready")))?;
            Ok(Entry { head: head.clone(), number, path, offset, modified })
        })();
        let mut entry = written.map_err(|error| s3_error!(error, InternalError))?;
        let mut table = self.table.lock();
        let ready = folder.join(format!("{number}.ready"));
        if let Err(error) = holds(&table) {
            std::fs::remove_file(ready).map_err(|error| s3_error!(error, InternalError))?;
            return Err(error);
        }
        entry.number = self.number();
        entry.path = folder.join(entry.number.to_string());
        let named =
            std::fs::rename(ready, &entry.path).and_then(|()| File::open(&folder)?.sync_all());
        named.map_err(|error| s3_error!(error, InternalError))?;
        let objects = table.buckets.get_mut(bucket).ok_or_else(|| s3_error!(NoSuchBucket))?;
        if let Some(older) = objects.insert(entry.head.key.clone(), entry) {
            std::fs::remove_file(older.path).map_err(|error| s3_error!(error, InternalError))?;
        }
        Ok(())
    }

    fn find(&self, bucket: &str, key: &str) -> S3Result<(Entry, File)> {
        let table = self.table.lock();
        let objects = table.buckets.get(bucket).ok_or_else(|| s3_error!(NoSuchBucket))?;
        let entry = objects.get(key).ok_or_else(|| s3_error!(NoSuchKey))?;
        // Opened under the lock: its name may be gone after it, its content is not.
        let file = File::open(&entry.path).map_err(|error| s3_error!(error, InternalError))?;
        Ok((entry.clone(), file))
    }

    fn upload(&self, id: &str) -> S3Result<PathBuf> {
        let known = !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_digit());
        let path = self.folder.join("uploads").join(id);
        if known && path.is_dir() { Ok(path) } else { Err(s3_error!(NoSuchUpload)) }
    }
}

fn read_entry(path: PathBuf, number: u64) -> io::Result<Entry> {
    let file = File::open(&path)?;
    let modified = file.metadata()?.modified()?;
    let mut line = Vec::new();
    BufReader::new(file).read_until(b'\n', &mut line)?;
    let head = serde_json::from_slice(&line)?;
    Ok(Entry { head, number, path, offset: line.len() as u64, modified })
}

fn etag_of(content: &[u8]) -> String {
    let digest = Sha256::digest(content);
    digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

async fn collect(body: Option<StreamingBlob>) -> S3Result<Bytes> {
    let mut all = BytesMut::new();
    let mut body = body.ok_or_else(|| s3_error!(IncompleteBody))?;
    while let Some(part) = body.next().await {
        all.extend_from_slice(&part.map_err(|_| s3_error!(IncompleteBody))?);
        if all.len() > BODY_BYTES_MAX {
            return Err(s3_error!(EntityTooLarge));
        }
    }
    Ok(all.freeze())
}

fn metadata_of(metadata: Option<s3s::dto::Metadata>) -> Metadata {
    metadata.unwrap_or_default().into_iter().collect()
}

fn size(bytes: u64) -> Option<i64> {
    i64::try_from(bytes).ok()
}

#[async_trait::async_trait]
impl S3 for Store {
    async fn put_object(
        &self,
        request: S3Request<PutObjectInput>,
    ) -> S3Result<S3Response<PutObjectOutput>> {
        let input = request.input;
        let content = collect(input.body).await?;
        let etag = etag_of(&content);
        let head = Head {
            key: input.key,
            etag: etag.clone(),
            metadata: metadata_of(input.metadata),
            size: content.len() as u64,
        };
        let (if_match, if_none_match) = (input.if_match, input.if_none_match);
        let mut content: &[u8] = &content;
        self.store(&input.bucket, head, &mut content, if_match.as_ref(), if_none_match.as_ref())?;
        let output = PutObjectOutput { e_tag: Some(ETag::Strong(etag)), ..Default::default() };
        Ok(S3Response::new(output))
    }

    async fn get_object(
        &self,
        request: S3Request<GetObjectInput>,
    ) -> S3Result<S3Response<GetObjectOutput>> {
        let input = request.input;
        let (entry, mut file) = self.find(&input.bucket, &input.key)?;
        let whole = entry.head.size;
        let range = match input.range {
            Some(range) => range.check(whole)?,
            None => 0..whole,
        };
        let mut content = Vec::new();
        let read = file
            .seek(SeekFrom::Start(entry.offset + range.start))
            .and_then(|_| file.take(range.end - range.start).read_to_end(&mut content));
        read.map_err(|error| s3_error!(error, InternalError))?;
        let content_range = input
            .range
            .map(|_| format!("bytes {}-{}/{whole}", range.start, range.end.saturating_sub(1)));
        let length = size(content.len() as u64);
        let body = futures_util::stream::iter([Ok::<_, io::Error>(Bytes::from(content))]);
        let output = GetObjectOutput {
            body: Some(StreamingBlob::wrap(body)),
            content_length: length,
            content_range,
            e_tag: Some(ETag::Strong(entry.head.etag)),
            last_modified: Some(Timestamp::from(entry.modified)),
            metadata: Some(entry.head.metadata.into_iter().collect()),
            ..Default::default()
        };
        Ok(S3Response::new(output))
    }

    async fn head_object(
        &self,
        request: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        let (entry, _) = self.find(&request.input.bucket, &request.input.key)?;
        let output = HeadObjectOutput {
            content_length: size(entry.head.size),
            e_tag: Some(ETag::Strong(entry.head.etag)),
            last_modified: Some(Timestamp::from(entry.modified)),
            metadata: Some(entry.head.metadata.into_iter().collect()),
            ..Default::default()
        };
        Ok(S3Response::new(output))
    }

    async fn delete_object(
        &self,
        request: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        let input = request.input;
        let mut table = self.table.lock();
        let objects =
            table.buckets.get_mut(&input.bucket).ok_or_else(|| s3_error!(NoSuchBucket))?;
        if let Some(entry) = objects.remove(&input.key) {
            let folder = self.folder.join("buckets").join(&input.bucket);
            let gone =
                std::fs::remove_file(entry.path).and_then(|()| File::open(folder)?.sync_all());
            gone.map_err(|error| s3_error!(error, InternalError))?;
        }
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn list_objects_v2(
        &self,
        request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = request.input;
        if input.delimiter.is_some() {
            return Err(s3_error!(NotImplemented, "lists with a delimiter"));
        }
        let table = self.table.lock();
        let objects = table.buckets.get(&input.bucket).ok_or_else(|| s3_error!(NoSuchBucket))?;
        let prefix = input.prefix.clone().unwrap_or_default();
        let after = input.continuation_token.clone().max(input.start_after.clone());
        let limit = input.max_keys.unwrap_or(1_000).clamp(0, 1_000);
        let limit = usize::try_from(limit).unwrap_or_default();
        let mut found = objects
            .iter()
            .filter(|(key, _)| key.starts_with(&prefix) && after.as_ref().is_none_or(|a| *key > a));
        let contents: Vec<Object> = found
            .by_ref()
            .take(limit)
            .map(|(key, entry)| Object {
                key: Some(key.clone()),
                e_tag: Some(ETag::Strong(entry.head.etag.clone())),
                size: size(entry.head.size),
                last_modified: Some(Timestamp::from(entry.modified)),
                ..Default::default()
            })
            .collect();
        let is_truncated = found.next().is_some();
        let last = contents.last().and_then(|object| object.key.clone());
        let output = ListObjectsV2Output {
            key_count: i32::try_from(contents.len()).ok(),
            max_keys: input.max_keys,
            is_truncated: Some(is_truncated),
            next_continuation_token: last.filter(|_| is_truncated),
            contents: Some(contents),
            name: Some(input.bucket),
            prefix: input.prefix,
            ..Default::default()
        };
        Ok(S3Response::new(output))
    }

    async fn create_multipart_upload(
        &self,
        request: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let input = request.input;
        if !self.table.lock().buckets.contains_key(&input.bucket) {
            return Err(s3_error!(NoSuchBucket));
        }
        let id = format!("{:020}{:010}", self.number(), std::process::id());
        let path = self.folder.join("uploads").join(&id);
        let metadata = serde_json::to_vec(&metadata_of(input.metadata)).unwrap_or_default();
        let made = std::fs::create_dir(&path)
            .and_then(|()| std::fs::write(path.join("metadata"), metadata));
        made.map_err(|error| s3_error!(error, InternalError))?;
        let output = CreateMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(id),
            ..Default::default()
        };
        Ok(S3Response::new(output))
    }

    async fn upload_part(
        &self,
        request: S3Request<UploadPartInput>,
    ) -> S3Result<S3Response<UploadPartOutput>> {
        let input = request.input;
        let folder = self.upload(&input.upload_id)?;
        let content = collect(input.body).await?;
        let etag = etag_of(&content);
        let path = folder.join(format!("{:05}-{etag}", input.part_number));
        std::fs::write(path, &content).map_err(|error| s3_error!(error, InternalError))?;
        let output = UploadPartOutput { e_tag: Some(ETag::Strong(etag)), ..Default::default() };
        Ok(S3Response::new(output))
    }

    async fn complete_multipart_upload(
        &self,
        request: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let input = request.input;
        let folder = self.upload(&input.upload_id)?;
        let parts = input.multipart_upload.and_then(|upload| upload.parts).unwrap_or_default();
        let (mut content, mut etags, mut whole): (Box<dyn io::Read + Send>, String, u64) =
            (Box::new(io::empty()), String::new(), 0);
        for (at, part) in parts.iter().enumerate() {
            let etag = part.e_tag.as_ref().ok_or_else(|| s3_error!(InvalidPart))?.value();
            let number = part.part_number.unwrap_or_default();
            let file = File::open(folder.join(format!("{number:05}-{etag}")))
                .map_err(|_| s3_error!(InvalidPart))?;
            let bytes = file.metadata().map_err(|error| s3_error!(error, InternalError))?.len();
            if at + 1 < parts.len() && bytes < PART_BYTES_MIN {
                return Err(s3_error!(EntityTooSmall));
            }
            etags.push_str(etag);
            whole += bytes;
            content = Box::new(content.chain(file));
        }
        let internal = |error: io::Error| s3_error!(error, InternalError);
        let metadata = std::fs::read(folder.join("metadata")).map_err(internal)?;
        let etag = format!("{}-{}", etag_of(etags.as_bytes()), parts.len());
        let head = Head {
            key: input.key.clone(),
            etag: etag.clone(),
            metadata: serde_json::from_slice(&metadata).unwrap_or_default(),
            size: whole,
        };
        let (if_match, if_none_match) = (input.if_match.as_ref(), input.if_none_match.as_ref());
        self.store(&input.bucket, head, &mut *content, if_match, if_none_match)?;
        std::fs::remove_dir_all(folder).map_err(internal)?;
        let output = CompleteMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            e_tag: Some(ETag::Strong(etag)),
            ..Default::default()
        };
        Ok(S3Response::new(output))
    }

    async fn abort_multipart_upload(
        &self,
        request: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        let folder = self.upload(&request.input.upload_id)?;
        std::fs::remove_dir_all(folder).map_err(|error| s3_error!(error, InternalError))?;
        Ok(S3Response::new(AbortMultipartUploadOutput::default()))
    }
}
