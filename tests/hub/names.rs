//! Names that lead elsewhere: refused before anything is written.

use std::fs;
use std::sync::Arc;

use crate::harness::{Cache, Told, checkpoint, manifest, options, refused};
use crate::server::Server;

const HOSTILE: [&str; 9] = [
    "../x",
    "/etc/x",
    "causal_video_vae/../../../x",
    "a\0b",
    "C:\\x",
    "a\\..\\x",
    "a//b",
    ".pyraflow/causal_video_vae.safetensors",
    "\u{1b}[2J",
];

#[test]
fn one_hostile_name_condemns_a_repository() {
    for name in HOSTILE {
        let mut files = checkpoint("flux");
        files.insert(name.to_owned(), Arc::new(b"owned".to_vec()));
        let server = Server::new(files);
        let cache = Cache::new();
        let ran = cache.run(&server, &["pull", "owner/name"]);
        ran.fails(4, &["has a file named", "nothing was written", "do not use"]);
        let left: Vec<_> = fs::read_dir(cache.path()).expect("a folder").flatten().collect();
        assert!(left.is_empty(), "{name:?}: {left:?}");
        assert_eq!(server.sent(), 0);
    }
}

#[test]
fn nor_does_a_manifest_get_past_the_check() {
    let (server, _) = Server::with_one(10);
    for name in HOSTILE {
        let cache = Cache::new();
        let names = manifest(&["folder/weights.bin", name]);
        let result = cache.hub(&server).pull(&names, &options(0), &mut Told::default());
        refused(result, 4, &["has a file named"]);
        assert!(fs::read_dir(cache.path()).expect("a folder").next().is_none(), "{name:?}");
    }
    let mut other = manifest(&["folder/weights.bin"]);
    other.revision = "../../x".to_owned();
    let error = Cache::new().hub(&server).pull(&other, &options(0), &mut Told::default());
    assert_eq!(error.expect_err("no commit").kind().exit_code(), 2);
}

#[test]
fn odd_but_honest_names_arrive() {
    let name = "folder/odd name #1?%ü+&.bin";
    let files = [(name.to_owned(), Arc::new(vec![7; 5000]))].into();
    let server = Server::new(files);
    let cache = Cache::new();
    cache.hub(&server).pull(&manifest(&[name]), &options(0), &mut Told::default()).expect("pulled");
    cache.has(name, &[7; 5000]);
}
