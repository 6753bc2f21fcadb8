//! Pulls that meet others, a full disk or a sudden end.

use std::fs;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use pyraflow::hub::Event;

use crate::harness::{Cache, Ran, Told, checkpoint, manifest, options, refused};
use crate::server::{COMMIT, LARGE, Server};

const NAME: &str = "folder/weights.bin";
const TRANSFORMER: &str = "diffusion_transformer_768p/diffusion_pytorch_model.safetensors";
const PULL: [&str; 4] = ["pull", "owner/name", "--keep-original", "--json"];

/// Everything is there, and right.
#[track_caller]
fn complete(cache: &Cache) {
    for (path, contents) in checkpoint("flux") {
        cache.has(&path, &contents);
    }
}

/// What a pull of the checkpoint takes: equal files once.
fn size() -> u64 {
    let mut contents: Vec<_> = checkpoint("flux").into_values().collect();
    contents.sort();
    contents.dedup();
    contents.iter().map(|c| c.len() as u64).sum()
}

#[test]
fn pulls_at_the_same_time_download_once() {
    let server = Server::new(checkpoint("flux"));
    let cache = Cache::new();
    server.slow(Duration::from_millis(1));
    let runs: Vec<_> =
        (0..4).map(|_| cache.command(&server, &PULL).spawn().expect("the binary starts")).collect();
    let runs: Vec<_> =
        runs.into_iter().map(|run| Ran::of(run.wait_with_output().expect("an end"))).collect();
    let count = |what: &str| {
        let events = runs.iter().flat_map(Ran::events);
        events.filter(|event| event["event"] == what).count()
    };
    assert!(runs.iter().all(|run| run.code == Some(0)), "{runs:?}");
    assert_eq!(count("start"), 1, "one had something to download");
    assert!(count("waiting") >= 1, "others waited");
    assert_eq!(server.sent(), size());
    complete(&cache);

    // Within one process, too.
    let (server, contents) = Server::with_one(1 << 20);
    let cache = Cache::new();
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| cache.pull_one(&server, 0).expect("pulled"));
        }
    });
    cache.has(NAME, &contents);
    assert_eq!(server.sent(), 1 << 20);
}

#[test]
fn the_lock_of_a_dead_process_is_free_and_that_of_a_living_one_is_not() {
    let (server, contents) = Server::with_one(100_000);
    let cache = Cache::new();
    let locks = cache.path().join("hub/.locks/models--owner--name");
    fs::create_dir_all(&locks).expect("a folder");
    let blob = locks.join(format!("{}.lock", crate::server::etag(&contents)));
    for lock in [&locks.join("pyraflow.lock"), &blob] {
        fs::write(lock, "12345").expect("a stale lock");
    }
    cache.pull_one(&server, 0).expect("at once");
    cache.has(NAME, &contents);

    // Another client, such as Hugging Face's own, downloads the same file: it is waited for,
    // and what it has made is taken.
    let cache = Cache::new();
    let locks = cache.path().join("hub/.locks/models--owner--name");
    fs::create_dir_all(&locks).expect("a folder");
    let name = crate::server::etag(&contents);
    let held = fs::File::create(locks.join(format!("{name}.lock"))).expect("a lock");
    held.lock().expect("locked");
    server.forget();
    thread::scope(|scope| {
        let pull = scope.spawn(|| cache.pull_one(&server, 0));
        thread::sleep(Duration::from_millis(300));
        assert!(!pull.is_finished(), "it waits");
        let blobs = cache.path().join("hub/models--owner--name/blobs");
        fs::create_dir_all(&blobs).expect("a folder");
        fs::write(blobs.join(&name), &*contents).expect("the other client's file");
        drop(held);
        pull.join().expect("no panic").expect("pulled");
    });
    cache.has(NAME, &contents);
    assert_eq!(server.sent(), 0);
}

#[test]
fn a_waiting_pull_can_be_stopped() {
    struct Impatient(Told);
    impl pyraflow::hub::Watcher for Impatient {
        fn event(&mut self, event: &Event) {
            self.0.event(event);
        }
        fn cancelled(&self) -> bool {
            !self.0.0.is_empty()
        }
    }
    let (server, _) = Server::with_one(10);
    let cache = Cache::new();
    let locks = cache.path().join("hub/.locks/models--owner--name");
    fs::create_dir_all(&locks).expect("a folder");
    let held = fs::File::create(locks.join("pyraflow.lock")).expect("a lock");
    held.lock().expect("locked");
    let mut watcher = Impatient(Told::default());
    let result = cache.hub(&server).pull(&manifest(&[NAME]), &options(0), &mut watcher);
    refused(result, 130, &["pull again"]);
    assert_eq!(watcher.0.0, [Event::Waiting { held: "owner/name".to_owned() }]);
}

/// Kills the binary again and again, each time after another while.
#[test]
fn a_kill_at_any_time_costs_little() {
    let server = Server::new(checkpoint("flux"));
    let cache = Cache::new();
    // The whole takes about two seconds.
    server.slow(Duration::from_millis(6));
    let mut kills = 0u64;
    let mut pause = 20;
    loop {
        let mut run = cache.command(&server, &PULL);
        run.stdout(Stdio::null()).stderr(Stdio::null());
        let mut run = run.spawn().expect("the binary starts");
        let begun = Instant::now();
        let ended = loop {
            if let Some(status) = run.try_wait().expect("a status") {
                assert!(status.success(), "{status:?} after {kills} kills");
                break true;
            }
            if begun.elapsed() > Duration::from_millis(pause) {
                break false;
            }
            thread::sleep(Duration::from_millis(1));
        };
        if ended {
            break;
        }
        run.kill().expect("killed");
        run.wait().expect("an end");
        kills += 1;
        pause = 20 + (kills * 97) % 400;
        for (path, contents) in checkpoint("flux") {
            if let Ok(found) = fs::read(cache.file(&path)) {
                assert!(found == *contents, "{path} after {kills} kills");
            }
        }
        assert!(kills < 200, "it gets somewhere");
    }
    assert!(kills >= 5, "{kills} kills are no test");
    complete(&cache);
    // A killed client may have had some bytes of each connection on their way to its disk.
    let on_the_way = kills * 4 * (512 << 10);
    let (sent, size) = (server.sent(), size());
    assert!(sent <= size + on_the_way, "{sent} bytes sent for {size}, {kills} kills");
    println!("{kills} kills: {sent} bytes sent for {size}");
    let resumed = server.log().iter().filter(|request| request.range.is_some()).count();
    assert!(resumed > 0, "parts were gone on with");
    cache.run(&server, &["verify", "owner/name"]).ok();
}

/// The same where weights are converted and published files removed: each time in a cache of
/// its own, so that the end of a pull is hit as well as its beginning.
#[test]
fn a_kill_while_converting_leaves_what_the_next_pull_completes() {
    let server = Server::new(checkpoint("flux"));
    let whole = Cache::new();
    whole.run(&server, &["pull", "owner/name", "-q"]).ok();
    let mut killed_after = [false; 2];
    for pause in (5..125).step_by(4) {
        let cache = Cache::new();
        let mut run = cache.command(&server, &["pull", "owner/name"]).spawn().expect("started");
        thread::sleep(Duration::from_millis(pause));
        run.kill().expect("killed");
        run.wait().expect("an end");
        let converting = cache.file(".pyraflow/causal_video_vae.safetensors").exists();
        killed_after[usize::from(converting)] = true;
        cache.run(&server, &["pull", "owner/name", "-q"]).ok();
        cache.run(&server, &["verify", "owner/name"]).ok();
        assert_eq!(cache.blobs(), whole.blobs(), "killed after {pause} ms");
        assert_eq!(cache.partials(), Vec::<u64>::new());
    }
    println!("killed before the first conversion and after it: {killed_after:?}");
    assert!(killed_after[0], "some were killed before");
}

#[test]
fn a_full_disk_keeps_what_is_there() {
    let server = Server::new(checkpoint("flux"));
    let large = checkpoint("flux")[TRANSFORMER].len();
    assert!(large > 600 << 10, "{large}");
    let cache = Cache::new();
    // Files may not grow beyond 512 KiB, as if the disk were full.
    let limit = "trap '' XFSZ; ulimit -f 1024";
    let ran = Ran::new(cache.shell(&server, limit, &PULL));
    ran.fails(7, &["cannot write", "free some space", "pull again"]);
    cache.lacks(TRANSFORMER);
    assert!(cache.partials().contains(&(512 << 10)), "{:?}", cache.partials());
    let before = server.sent();
    cache.run(&server, &PULL).ok();
    complete(&cache);
    assert!(server.sent() > before);
    let resumed = server.log().iter().any(|r| r.range == Some(512 << 10));
    assert!(resumed, "gone on from where the disk was full");
}

#[test]
fn a_disk_too_small_is_noticed_before_the_download() {
    let (server, _) = Server::with_one(LARGE);
    server.script(|request| {
        let length = (1u64 << 60).to_string();
        let headers = [("X-Linked-Etag", "0".repeat(64)), ("X-Linked-Size", length)];
        let headers = headers.map(|(name, value)| (name.to_owned(), value));
        let location = ("Location".to_owned(), format!("/{}", request.number));
        let headers = [&headers[..], &[location]].concat();
        Some(crate::server::Act::Answer(302, headers, Vec::new()))
    });
    let cache = Cache::new();
    let free = "bytes free, 1152921504606846976 are to be downloaded";
    refused(cache.pull_one(&server, 0), 7, &[free, "HF_HUB_CACHE"]);
    assert_eq!(server.sent(), 0);
    assert!(!cache.path().join(COMMIT).exists());
}

#[test]
fn an_interrupt_keeps_what_is_there() {
    let server = Server::new(checkpoint("flux"));
    let cache = Cache::new();
    server.slow(Duration::from_millis(10));
    let run = cache.command(&server, &PULL).spawn().expect("the binary starts");
    while server.sent() < 1 << 20 {
        thread::sleep(Duration::from_millis(5));
    }
    let kill = format!("kill -INT {}", run.id());
    assert!(std::process::Command::new("sh").arg("-c").arg(kill).status().expect("sh").success());
    let ran = Ran::of(run.wait_with_output().expect("an end"));
    ran.fails(130, &["what is downloaded is kept", "pull again"]);
    assert!(cache.partials().iter().sum::<u64>() > 0);
    server.slow(Duration::ZERO);
    cache.run(&server, &PULL).ok();
    complete(&cache);
}
