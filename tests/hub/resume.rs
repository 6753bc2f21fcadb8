//! Downloads that are cut, repeated and answered wrongly: whole or absent at the end, and
//! nothing asked for twice without need.

use std::fs;
use std::sync::Arc;

use crate::harness::{Cache, Told, manifest, options, refused};
use crate::server::{Act, At, Server, etag, noise, sha256};

const NAME: &str = "folder/weights.bin";
const STEP: usize = 64 << 10;
const BYTES: usize = 10 * STEP + 7;

/// Cuts the first download of the file after so many bytes.
fn cut_first(server: &Server, after: usize) {
    let mut done = false;
    server.script(move |request| {
        let hit = request.at == At::Storage && request.method == "GET";
        (hit && !std::mem::replace(&mut done, true)).then_some(Act::Cut(after))
    });
}

/// The same, and then the server is gone for good.
fn cut_and_die(server: &Server, after: usize) {
    let mut cut = false;
    server.script(move |request| {
        let hit = request.at == At::Storage && request.method == "GET";
        if cut {
            return Some(Act::status(503, &[]));
        }
        cut = hit;
        hit.then_some(Act::Cut(after))
    });
}

#[test]
fn a_cut_at_any_boundary_is_gone_on_from_there() {
    let boundaries = (0..=BYTES / STEP).map(|i| i * STEP);
    let odd = [1, 4095, STEP - 1, STEP + 1, BYTES - 1];
    for after in boundaries.chain(odd) {
        // Within one run.
        let (server, contents) = Server::with_one(BYTES);
        let cache = Cache::new();
        cut_first(&server, after);
        cache.pull_one(&server, 1).unwrap_or_else(|e| panic!("{after}: {e}"));
        cache.has(NAME, &contents);
        assert_eq!(server.starts(NAME), [0, after as u64]);
        assert_eq!(server.sent(), BYTES as u64, "cut after {after}: nothing is sent twice");

        // In a run that gives up, and the next one.
        server.forget();
        let cache = Cache::new();
        cut_and_die(&server, after);
        refused(cache.pull_one(&server, 0), 8, &["pull again"]);
        server.no_script();
        cache.lacks(NAME);
        assert_eq!(cache.partials(), [after as u64]);
        cache.pull_one(&server, 0).expect("the second run");
        cache.has(NAME, &contents);
        assert_eq!(server.starts(NAME), [0, after as u64]);
        assert_eq!(server.sent(), BYTES as u64);
    }
}

#[test]
fn every_connection_may_be_cut() {
    let (server, contents) = Server::with_one(BYTES);
    let cache = Cache::new();
    server.script(|request| (request.at == At::Storage).then_some(Act::Cut(STEP)));
    // Progress starts the count of tries anew, so one is enough.
    cache.pull_one(&server, 1).expect("in many parts");
    cache.has(NAME, &contents);
    assert_eq!(server.starts(NAME).len(), BYTES.div_ceil(STEP));
    assert_eq!(server.sent(), BYTES as u64);

    let cache = Cache::new();
    server.script(|request| (request.at == At::Storage).then_some(Act::Cut(0)));
    server.forget();
    let text = refused(cache.pull_one(&server, 3), 8, &["given up after 4 tries", "pull again"]);
    assert!(text.contains("0 of 655367 bytes") && !text.contains("secret"), "{text}");
    assert_eq!(server.starts(NAME).len(), 4);
}

#[test]
fn a_server_that_ignores_ranges_still_gets_the_file_across() {
    let (server, contents) = Server::with_one(BYTES);
    let cache = Cache::new();
    let mut downloads = 0;
    server.script(move |request| {
        if request.at != At::Storage {
            return None;
        }
        downloads += 1;
        Some(if downloads == 1 { Act::Cut(3 * STEP) } else { Act::WithoutRange })
    });
    cache.pull_one(&server, 1).expect("from the beginning");
    cache.has(NAME, &contents);
    assert_eq!(server.starts(NAME), [0, 3 * STEP as u64]);
    assert_eq!(server.sent(), (3 * STEP + BYTES) as u64);
}

#[test]
fn a_wrong_range_is_not_appended() {
    for range in [
        "bytes 0-655366/655367",
        "bytes 131073-655366/655367",
        "bytes 131072-655366/655368",
        "bytes 131072-655366",
        "nonsense",
        "",
    ] {
        let (server, contents) = Server::with_one(BYTES);
        let cache = Cache::new();
        let mut downloads = 0;
        server.script(move |request| {
            if request.at != At::Storage {
                return None;
            }
            downloads += 1;
            match downloads {
                1 => Some(Act::Cut(2 * STEP)),
                2 => Some(Act::Range(range.to_owned())),
                _ => None,
            }
        });
        cache.pull_one(&server, 1).unwrap_or_else(|e| panic!("{range}: {e}"));
        cache.has(NAME, &contents);
        assert_eq!(server.starts(NAME), [0, 2 * STEP as u64, 0], "{range}");
    }
    // A part that nobody asked for is refused as well.
    let (server, _) = Server::with_one(BYTES);
    let cache = Cache::new();
    let body = noise(BYTES);
    server.script(move |request| {
        let headers = vec![("Content-Range".into(), "bytes 7-655366/655367".into())];
        let whole = Act::Answer(206, headers, body[7..].to_vec());
        (request.at == At::Storage).then_some(whole)
    });
    refused(cache.pull_one(&server, 1), 8, &["bytes 7-655366/655367", "HF_ENDPOINT"]);
    cache.lacks(NAME);
}

#[test]
fn a_partial_file_of_other_contents_is_replaced() {
    let (server, contents) = Server::with_one(BYTES);
    let partial = |cache: &Cache| {
        let blobs = cache.path().join("hub/models--owner--name/blobs");
        fs::create_dir_all(&blobs).expect("a folder");
        blobs.join(format!("{}.incomplete", etag(&contents)))
    };
    // Wrong bytes, too many bytes, and all bytes but wrong ones.
    for wrong in [noise(5 * STEP), noise(BYTES + 1), vec![0; BYTES]] {
        let cache = Cache::new();
        fs::write(partial(&cache), &wrong).expect("written");
        cache.pull_one(&server, 0).unwrap_or_else(|e| panic!("{} bytes: {e}", wrong.len()));
        cache.has(NAME, &contents);
    }
    // All of it, and right: nothing is left to send.
    let cache = Cache::new();
    fs::write(partial(&cache), &*contents).expect("written");
    server.forget();
    cache.pull_one(&server, 0).expect("no download");
    cache.has(NAME, &contents);
    assert_eq!(server.sent(), 0);
}

#[test]
fn a_file_that_changes_between_two_parts_is_taken_as_it_is_now() {
    let (server, _) = Server::with_one(BYTES);
    let cache = Cache::new();
    let other = noise(BYTES + 100);
    cut_and_die(&server, 3 * STEP);
    refused(cache.pull_one(&server, 0), 8, &[]);
    server.no_script();
    server.set(NAME, other.clone());
    cache.pull_one(&server, 0).expect("the new file");
    let found = fs::read(cache.file(NAME)).expect("a file");
    assert!(found == other, "the new contents alone");

    // Within one run: the hub's tag changes while the file is on its way.
    let (server, first) = Server::with_one(BYTES);
    let cache = Cache::new();
    let changed = Arc::new(noise(BYTES + 1));
    let (now, mut gets) = (Arc::clone(&changed), 0);
    server.script(move |request| {
        gets += usize::from(request.at == At::Storage);
        match (request.at, gets) {
            (At::Storage, 1) => Some(Act::Cut(2 * STEP)),
            (_, 0) => None,
            _ => Some(Act::Contents(Arc::clone(&now))),
        }
    });
    cache.pull_one(&server, 1).expect("the new file");
    cache.has(NAME, &changed);
    assert_ne!(etag(&first), etag(&changed));

    // A server that changes it every time is left alone.
    let (server, _) = Server::with_one(BYTES);
    let cache = Cache::new();
    let mut size = BYTES;
    server.script(move |_| {
        size += 1;
        Some(Act::Contents(Arc::new(noise(size))))
    });
    refused(cache.pull_one(&server, 2), 8, &["keeps changing", "pull again"]);
    cache.lacks(NAME);
}

#[test]
fn too_few_and_too_many_bytes() {
    // The answer says fewer bytes than the file has.
    let (server, contents) = Server::with_one(BYTES);
    let cache = Cache::new();
    let short = Arc::new(contents[..BYTES - 1].to_vec());
    server.script(move |request| {
        (request.at == At::Storage).then(|| Act::Contents(Arc::clone(&short)))
    });
    refused(cache.pull_one(&server, 1), 8, &["should have 655367 bytes", "655366"]);
    cache.lacks(NAME);

    // Without saying how many, it sends more.
    let cache = Cache::new();
    let long = [&contents[..], b"more"].concat();
    server.script(move |request| {
        let headers = vec![("Transfer-Encoding".into(), "chunked".into())];
        let mut body = format!("{:x}\r\n", long.len()).into_bytes();
        body.extend(&long);
        body.extend(b"\r\n0\r\n\r\n");
        let headers = [headers, vec![("Content-Length".into(), String::new())]].concat();
        let headers = headers.into_iter().filter(|(_, v)| !v.is_empty()).collect();
        (request.at == At::Storage).then(|| Act::Answer(200, headers, body.clone()))
    });
    let result = cache.pull_one(&server, 1);
    refused(result, 8, &["pull again"]);
    cache.lacks(NAME);
}

#[test]
fn a_wrong_hash_never_becomes_a_file() {
    let (server, contents) = Server::with_one(BYTES);
    let cache = Cache::new();
    let mut wrong = contents.to_vec();
    wrong[BYTES / 2] ^= 1;
    let wrong = Arc::new(wrong);
    server.script(move |request| {
        (request.at == At::Storage).then(|| Act::Contents(Arc::clone(&wrong)))
    });
    let hash = sha256(&contents);
    refused(cache.pull_one(&server, 3), 8, &[NAME, &hash, "thrown away", "pull again"]);
    cache.lacks(NAME);
    assert_eq!((cache.partials(), cache.blobs()), (vec![], vec![]));
    assert_eq!(server.starts(NAME), [0], "the same again would be no better");

    // The first half of a wrong file, then the right one: put together wrongly, started anew.
    let cache = Cache::new();
    let mut wrong = contents.to_vec();
    wrong[0] ^= 1;
    let (wrong, mut gets) = (Arc::new(wrong), 0);
    server.forget();
    server.script(move |request| {
        gets += usize::from(request.at == At::Storage);
        let cut = request.at == At::Storage && gets == 1;
        cut.then(|| {
            Act::Answer(
                200,
                vec![("Content-Length".into(), wrong.len().to_string())],
                wrong[..STEP].to_vec(),
            )
        })
    });
    cache.pull_one(&server, 1).expect("the right file in the end");
    cache.has(NAME, &contents);
    assert_eq!(server.starts(NAME), [0, STEP as u64, 0]);
}

#[test]
fn a_small_file_is_held_to_gits_hash() {
    let (server, _) = Server::with_one(100);
    let cache = Cache::new();
    server.script(|request| {
        let tag = [("ETag", "\"ce013625030ba8dba906f756967f9e9ca394464a\"")];
        let hello = |body: &[u8]| {
            let headers = tag.map(|(n, v)| (n.to_owned(), v.to_owned()));
            Act::Answer(200, headers.into(), body.to_vec())
        };
        // "hello\n" has that tag.
        (request.at == At::Hub)
            .then(|| hello(if request.number < 2 { b"hellO\n" } else { b"hello\n" }))
    });
    refused(cache.pull_one(&server, 0), 8, &["ce013625030ba8dba906f756967f9e9ca394464a"]);
    cache.lacks(NAME);
    cache.pull_one(&server, 0).expect("the right one");
    cache.has(NAME, b"hello\n");
}

#[test]
fn what_is_there_is_not_fetched_again() {
    let names: Vec<String> = (0..12).map(|i| format!("folder/file-{i}.bin")).collect();
    let files = names.iter().enumerate();
    let files = files.map(|(i, n)| (n.clone(), Arc::new(noise(1 + i * 7000)))).collect();
    let server = Server::new(files);
    let cache = Cache::new();
    let paths: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut told = Told::default();
    let half = manifest(&paths[..6]);
    let pulled = cache.hub(&server).pull(&half, &options(0), &mut told).expect("half of them");
    assert_eq!((pulled.downloaded, told.outcomes().len()), (6, 6));

    server.forget();
    let all = manifest(&paths);
    let pulled = cache.hub(&server).pull(&all, &options(0), &mut Told::default()).expect("all");
    assert_eq!(pulled.downloaded, 6);
    let asked = |name: &str| server.log().iter().any(|r| r.path.contains(name));
    assert!(!asked("file-5.bin") && asked("file-6.bin"));

    server.forget();
    cache.hub(&server).pull(&all, &options(0), &mut Told::default()).expect("all");
    assert!(server.log().is_empty(), "a complete model needs no network");

    // Damaged, with another time of change: noticed, and that one fetched again.
    let path = cache.file("folder/file-3.bin");
    let mut bytes = fs::read(&path).expect("a file");
    bytes[9] ^= 4;
    fs::write(&path, &bytes).expect("written");
    let pulled = cache.hub(&server).pull(&all, &options(0), &mut told).expect("repaired");
    assert_eq!(pulled.downloaded, 1);
    cache.has("folder/file-3.bin", &noise(1 + 3 * 7000));
}
