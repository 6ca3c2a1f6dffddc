//! The fuzz targets' corpora, and every input that ever broke one: none breaks it now. `cargo xtask fuzz` looks for more.

use std::path::Path;

use sheave_tests::fuzz;

/// Runs a target on its corpus and on what was found with it.
fn replay(target: &str, run: fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let mut inputs = 0;
    for kind in ["corpus", "finds"] {
        let Ok(entries) = std::fs::read_dir(directory.join(kind).join(target)) else { continue };
        for entry in entries {
            let path = entry.expect("a directory entry").path();
            let input = std::fs::read(&path).expect("an input");
            // A panic alone would not say which input it was.
            let result = std::panic::catch_unwind(|| run(&input));
            assert!(result.is_ok(), "{} breaks it", path.display());
            inputs += 1;
        }
    }
    assert!(inputs > 10, "{inputs} inputs for {target}: where is the corpus?");
}

/// Inputs of chance reach little, but they take no corpus.
fn by_chance(run: fn(&[u8])) {
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..2_000 {
        let input: Vec<u8> = (0..random.usize(..300)).map(|_| random.u8(..)).collect();
        let result = std::panic::catch_unwind(|| run(&input));
        assert!(result.is_ok(), "{input:?} breaks it");
    }
}

fn holds(target: &str, run: fn(&[u8])) {
    replay(target, run);
    by_chance(run);
}

#[test]
fn packets_in_the_programs_on_the_host() {
    holds("packets", fuzz::packets::run);
}

#[test]
fn headers_in_the_parser_on_the_host() {
    holds("headers", fuzz::packets::run_headers);
}

#[test]
fn objects_from_an_api_server() {
    holds("objects", fuzz::objects::run);
}

#[test]
fn manifests_in_a_folder() {
    holds("manifests", fuzz::manifests::run);
}

#[test]
fn maps_that_are_read_back() {
    holds("readback", fuzz::readback::run);
}
