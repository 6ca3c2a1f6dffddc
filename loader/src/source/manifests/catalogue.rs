//! Which file gives which object, and what has changed since somebody asked.
//!
//! A broken file keeps what it gave when it was sound. An object in several files is taken from the one whose name
//! sorts first.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io;

use super::document::{self, Format, Key, Object};
use crate::model::Change;

/// A file as it was last read.
#[derive(Debug, Default)]
struct File {
    /// Objects of its last sound version.
    objects: BTreeMap<Key, Object>,
    /// What is wrong with it now.
    complaint: Option<String>,
}

/// All files of the folder.
#[derive(Debug)]
pub struct Catalogue {
    node_name: String,
    files: BTreeMap<OsString, File>,
    /// Which files give an object.
    givers: BTreeMap<Key, BTreeSet<OsString>>,
    /// What has been reported.
    reported: BTreeMap<Key, Object>,
    /// Objects to compare with what has been reported.
    touched: BTreeSet<Key>,
}

impl Catalogue {
    /// Of an empty folder. Nodes that are not the one of this name don't count.
    #[must_use]
    pub const fn new(node_name: String) -> Self {
        Self {
            node_name,
            files: BTreeMap::new(),
            givers: BTreeMap::new(),
            reported: BTreeMap::new(),
            touched: BTreeSet::new(),
        }
    }

    /// Files that gave something, or are broken.
    pub(super) fn files(&self) -> impl Iterator<Item = &OsStr> {
        self.files.keys().map(OsString::as_os_str)
    }

    /// Somebody looked at a file, and this is what came of it.
    pub fn see(&mut self, name: &OsStr, text: io::Result<String>) {
        let Some(format) = Format::of(name) else { return };
        match text {
            Ok(text) => self.put(name, format, &text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.remove(name),
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => {}
            Err(error) => self.complain(name, error.to_string()),
        }
    }

    fn put(&mut self, name: &OsStr, format: Format, text: &str) {
        match document::read(format, text) {
            Ok(objects) => {
                let mut given = BTreeMap::new();
                for object in objects {
                    let key = object.key();
                    if matches!(&key, Key::Node(node) if *node != self.node_name) {
                        continue;
                    }
                    if given.contains_key(&key) {
                        tracing::warn!(object = %key, file = %name.display(),
                            "twice in one file: the first counts");
                        continue;
                    }
                    given.insert(key, object);
                }
                self.give(name, given);
            }
            Err(broken) => self.complain(name, format!("line {}: {}", broken.line, broken.message)),
        }
    }

    fn remove(&mut self, name: &OsStr) {
        self.give(name, BTreeMap::new());
        self.files.remove(name);
    }

    /// What has to be done to what was reported, to match the files.
    pub fn take_changes(&mut self) -> Vec<Change> {
        let mut changes = Vec::new();
        for key in std::mem::take(&mut self.touched) {
            let giver = self.givers.get(&key).and_then(|givers| givers.first());
            let object = giver.and_then(|giver| self.files.get(giver)?.objects.get(&key));
            if object == self.reported.get(&key) {
                continue;
            }
            if let Some(object) = object {
                self.reported.insert(key, object.clone());
                changes.push(match object.clone() {
                    Object::Service(service) => Change::Service(service),
                    Object::Slice(slice) => Change::Slice(slice),
                    Object::Node(node) => Change::Node(node),
                    Object::ServiceCidr(cidr) => Change::ServiceCidr(cidr),
                });
            } else {
                self.reported.remove(&key);
                changes.push(match key {
                    Key::Service(key) => Change::ServiceGone(key),
                    Key::Slice(key) => Change::SliceGone(key),
                    Key::Node(_) => Change::NodeGone,
                    Key::ServiceCidr(name) => Change::ServiceCidrGone(name),
                });
            }
        }
        changes
    }

    fn give(&mut self, name: &OsStr, objects: BTreeMap<Key, Object>) {
        let known = self.files.entry(name.to_owned()).or_default();
        if known.complaint.take().is_some() {
            tracing::info!(file = %name.display(), "can be read again");
        }
        let old = std::mem::replace(&mut known.objects, objects);
        for key in old.keys().filter(|key| !known.objects.contains_key(key)) {
            if let Some(givers) = self.givers.get_mut(key) {
                givers.remove(name);
                if givers.is_empty() {
                    self.givers.remove(key);
                }
            }
        }
        for key in known.objects.keys() {
            let givers = self.givers.entry(key.clone()).or_default();
            if givers.insert(name.to_owned()) && givers.len() > 1 {
                let files: Vec<String> = givers.iter().map(|giver| giver.display().to_string()).collect();
                tracing::warn!(object = %key, files = files.join(", "), "in several files: the first one counts");
            }
        }
        self.touched.extend(old.into_keys());
        self.touched.extend(known.objects.keys().cloned());
    }

    fn complain(&mut self, name: &OsStr, complaint: String) {
        let file = self.files.entry(name.to_owned()).or_default();
        if file.complaint.as_ref() != Some(&complaint) {
            tracing::warn!(file = %name.display(), error = complaint,
                "can't read this manifest: what it held before stays in place");
            file.complaint = Some(complaint);
        }
    }
}
