//! `backup`: a copy of the store in a file that only its owner reads; it holds the digests of keys and tokens.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;

use serde_json::json;
use weir_proto::v1;

use crate::args::{BackupArgs, Cli};
use crate::client::Client;
use crate::error::Error;
use crate::output::Io;

pub(super) async fn backup(cli: &Cli, io: &mut Io<'_>, args: &BackupArgs) -> Result<(), Error> {
    let path = args.file.display().to_string();
    let failed = |source| Error::Write { path: path.clone(), source };
    let client = Client::connect(cli).await?;
    let mut stream = client.open(v1::BackupRequest {}, |mut c, r| async move { c.backup(r).await }).await?;
    let mut options = std::fs::OpenOptions::new();
    // Never over another backup.
    let mut file = options.write(true).create_new(true).mode(0o600).open(&args.file).map_err(failed)?;
    let mut bytes = 0;
    while let Some(part) = client.heard(stream.message().await)? {
        file.write_all(&part.chunk).map_err(failed)?;
        bytes += part.chunk.len();
    }
    file.sync_all().map_err(failed)?;
    io.result(|| format!("{bytes} bytes in {path}\n"), || json!({"file": path, "bytes": bytes}))
}
