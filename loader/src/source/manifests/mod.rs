//! A folder of manifests as a source: Services, EndpointSlices, this Node and ServiceCIDRs in YAML or JSON files,
//! followed with inotify.
//!
//! [`document`] reads a file's text, [`catalogue`] knows which file gives which object and what changed, [`watch`]
//! says which files to look at again. Files in folders below, and those whose name begins with a dot, don't count.

mod catalogue;
mod document;
mod watch;

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};

use tokio::sync::mpsc::Sender;

use super::{SourceError, SourceEvent};
use crate::model::Change;
pub use catalogue::Catalogue;
use document::Format;
use watch::{Touched, Watch};

/// Follows the folder until the receiver is gone. A folder that isn't there (yet, or any more) is waited for; what it
/// last held stays in place.
///
/// # Errors
///
/// If the kernel gives no inotify instance.
pub async fn run(directory: PathBuf, node_name: String, sender: Sender<SourceEvent>) -> Result<(), SourceError> {
    tokio::select! {
        result = follow(directory, node_name, &sender) => result,
        () = sender.closed() => Ok(()),
    }
}

async fn follow(directory: PathBuf, node_name: String, sender: &Sender<SourceEvent>) -> Result<(), SourceError> {
    let mut watch = Watch::new(directory.clone())?;
    let mut catalogue = Catalogue::new(node_name);
    let mut synced = false;
    loop {
        let touched = watch.next().await?;
        let read = match &touched {
            Touched::Everything => everything(&directory, &catalogue).await,
            Touched::Files(names) => Ok(names.clone()),
        };
        let files = match read {
            Ok(names) => read_files(&directory, names).await,
            Err(error) => {
                watch.lost(&error);
                continue;
            }
        };
        // Files that went together with their folder were not taken away one by one.
        if !directory.is_dir() {
            watch.lost(&io::ErrorKind::NotFound.into());
            continue;
        }
        for (name, text) in files {
            catalogue.see(&name, text);
        }
        let mut changes = catalogue.take_changes();
        if !synced {
            // A folder is all there is: if it names no ServiceCIDR, none is left.
            changes.insert(0, Change::ServiceCidrsReplaced(Vec::new()));
        }
        if !changes.is_empty() && sender.send(SourceEvent::Changes(changes)).await.is_err() {
            return Ok(());
        }
        if !synced {
            synced = true;
            if sender.send(SourceEvent::Synced).await.is_err() {
                return Ok(());
            }
        }
    }
}

/// Every manifest in the folder, and every one that was there before.
async fn everything(directory: &Path, catalogue: &Catalogue) -> io::Result<BTreeSet<OsString>> {
    let mut names: BTreeSet<OsString> = catalogue.files().map(OsStr::to_owned).collect();
    let mut entries = tokio::fs::read_dir(directory).await?;
    while let Some(entry) = entries.next_entry().await? {
        names.insert(entry.file_name());
    }
    names.retain(|name| Format::of(name).is_some());
    Ok(names)
}

async fn read_files(directory: &Path, names: BTreeSet<OsString>) -> Vec<(OsString, io::Result<String>)> {
    let mut files = Vec::with_capacity(names.len());
    for name in names {
        let text = tokio::fs::read_to_string(directory.join(&name)).await;
        files.push((name, text));
    }
    files
}
