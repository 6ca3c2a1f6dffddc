//! A container image of one file, as an OCI image layout in a tar archive: what `skopeo copy oci-archive:…`, `podman load` and
//! `ctr images import` read. The same file gives the same archive, byte by byte.
//!
//! <https://github.com/opencontainers/image-spec>

use std::io::Write as _;

use anyhow::Result;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// No clock goes into an image.
const CREATED: &str = "1970-01-01T00:00:00Z";

/// What is in the image, and how it is run.
pub(crate) struct Image<'a> {
    /// The only file, executable and root's.
    pub(crate) program: &'a [u8],
    /// Its absolute path.
    pub(crate) path: &'a str,
    /// As Go names it: `amd64`, `arm64`.
    pub(crate) architecture: &'a str,
    /// The tag, and the label.
    pub(crate) version: &'a str,
}

/// A part of the image that others name by its digest.
struct Blob {
    media_type: &'static str,
    content: Vec<u8>,
}

impl Blob {
    fn json(media_type: &'static str, value: &Value) -> Self {
        Self { media_type, content: value.to_string().into_bytes() }
    }

    fn descriptor(&self) -> Value {
        json!({"mediaType": self.media_type, "digest": digest(&self.content), "size": self.content.len()})
    }
}

impl Image<'_> {
    /// The archive.
    ///
    /// # Errors
    ///
    /// If the path is too long for a tar archive.
    pub(crate) fn archive(&self) -> Result<Vec<u8>> {
        let tree = self.tree()?;
        let mut compressed = GzEncoder::new(Vec::new(), Compression::default());
        compressed.write_all(&tree)?;
        let layer = Blob { media_type: LAYER, content: compressed.finish()? };
        let config = Blob::json(CONFIG, &self.config(&digest(&tree)));
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": config.descriptor(), "layers": [layer.descriptor()],
        });
        let manifest = Blob::json(MANIFEST, &manifest);
        let mut entry = manifest.descriptor();
        entry["platform"] = json!({"os": "linux", "architecture": self.architecture});
        entry["annotations"] = json!({"org.opencontainers.image.ref.name": self.version});
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]});

        let mut blobs = [layer, config, manifest].map(|blob| (digest(&blob.content).replace(':', "/"), blob.content));
        blobs.sort();
        let mut archive = Builder::new(Vec::new());
        folder(&mut archive, "blobs/")?;
        folder(&mut archive, "blobs/sha256/")?;
        for (name, content) in &blobs {
            file(&mut archive, &format!("blobs/{name}"), content, 0o644)?;
        }
        file(&mut archive, "index.json", index.to_string().as_bytes(), 0o644)?;
        file(&mut archive, "oci-layout", json!({"imageLayoutVersion": "1.0.0"}).to_string().as_bytes(), 0o644)?;
        Ok(archive.into_inner()?)
    }

    /// The image's file system.
    fn tree(&self) -> Result<Vec<u8>> {
        let path = self.path.trim_start_matches('/');
        let mut tree = Builder::new(Vec::new());
        for (end, _) in path.match_indices('/') {
            folder(&mut tree, &path[..=end])?;
        }
        file(&mut tree, path, self.program, 0o755)?;
        Ok(tree.into_inner()?)
    }

    fn config(&self, tree: &str) -> Value {
        let folder = self.path.rsplit_once('/').map_or("/", |(folder, _)| folder);
        json!({
            "created": CREATED, "os": "linux", "architecture": self.architecture,
            "config": {
                "Entrypoint": [self.path],
                "Env": [format!("PATH={folder}")],
                "Labels": {"org.opencontainers.image.title": "sheave", "org.opencontainers.image.version": self.version},
            },
            "rootfs": {"type": "layers", "diff_ids": [tree]},
            "history": [{"created": CREATED, "created_by": "cargo xtask image"}],
        })
    }
}

fn folder(archive: &mut Builder<Vec<u8>>, path: &str) -> Result<()> {
    entry(archive, path, &[], 0o755, EntryType::Directory)
}

fn file(archive: &mut Builder<Vec<u8>>, path: &str, content: &[u8], mode: u32) -> Result<()> {
    entry(archive, path, content, mode, EntryType::Regular)
}

fn entry(archive: &mut Builder<Vec<u8>>, path: &str, content: &[u8], mode: u32, kind: EntryType) -> Result<()> {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_size(content.len().try_into()?);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    Ok(archive.append_data(&mut header, path, content)?)
}

fn digest(content: &[u8]) -> String {
    let sum = Sha256::digest(content);
    sum.iter().fold("sha256:".to_owned(), |text, byte| text + &format!("{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read as _;

    use flate2::read::GzDecoder;
    use tar::Archive;

    use super::*;

    const IMAGE: Image<'static> =
        Image { program: b"a program", path: "/usr/bin/sheave", architecture: "arm64", version: "1.2.3" };

    struct File {
        content: Vec<u8>,
        header: Header,
    }

    fn files(tar: &[u8]) -> BTreeMap<String, File> {
        let mut archive = Archive::new(tar);
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            (entry.path().unwrap().display().to_string(), File { content, header: entry.header().clone() })
        });
        entries.collect()
    }

    /// What a descriptor describes, as a registry checks it.
    fn described<'a>(files: &'a BTreeMap<String, File>, descriptor: &Value, media_type: &str) -> &'a [u8] {
        assert_eq!(descriptor["mediaType"], media_type);
        let digest = descriptor["digest"].as_str().unwrap();
        let content = &files[&format!("blobs/{}", digest.replace(':', "/"))].content;
        assert_eq!(super::digest(content), digest);
        assert_eq!(descriptor["size"], content.len());
        content
    }

    #[test]
    fn every_part_is_what_the_one_before_says_down_to_the_program() {
        let archive = files(&IMAGE.archive().unwrap());
        let json = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
        assert_eq!(json(&archive["oci-layout"].content), json!({"imageLayoutVersion": "1.0.0"}));
        let index = json(&archive["index.json"].content);
        assert_eq!(index["manifests"].as_array().unwrap().len(), 1);
        assert_eq!(index["manifests"][0]["platform"], json!({"os": "linux", "architecture": "arm64"}));
        let manifest = json(described(&archive, &index["manifests"][0], MANIFEST));
        let config = json(described(&archive, &manifest["config"], CONFIG));
        assert_eq!((&config["os"], &config["architecture"]), (&json!("linux"), &json!("arm64")));
        assert_eq!(config["config"]["Entrypoint"], json!(["/usr/bin/sheave"]));
        assert_eq!(config["config"]["Env"], json!(["PATH=/usr/bin"]));

        assert_eq!(manifest["layers"].as_array().unwrap().len(), 1);
        let mut tree = Vec::new();
        GzDecoder::new(described(&archive, &manifest["layers"][0], LAYER)).read_to_end(&mut tree).unwrap();
        assert_eq!(config["rootfs"]["diff_ids"], json!([digest(&tree)]));
        let tree = files(&tree);
        assert_eq!(tree.keys().collect::<Vec<_>>(), ["usr/", "usr/bin/", "usr/bin/sheave"]);
        let program = &tree["usr/bin/sheave"];
        assert_eq!(program.content, IMAGE.program);
        assert_eq!((program.header.mode().unwrap(), program.header.uid().unwrap()), (0o755, 0));
    }

    #[test]
    fn the_same_program_gives_the_same_archive_and_no_clock_is_in_it() {
        let archive = IMAGE.archive().unwrap();
        assert_eq!(archive, IMAGE.archive().unwrap());
        assert!(files(&archive).values().all(|file| file.header.mtime().unwrap() == 0));
        let other = Image { program: b"another", ..IMAGE };
        assert_ne!(archive, other.archive().unwrap());
    }
}
