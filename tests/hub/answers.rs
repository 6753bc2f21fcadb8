//! Every answer but the right one: repeated where that can help, refused with the next step
//! where it cannot, and the token kept at home.

use std::time::{Duration, Instant};

use pyraflow::hub::{Hub, ModelName, Settings};

use crate::harness::{Cache, Ran, Told, manifest, options, refused};
use crate::server::{Act, At, COMMIT, Server, noise, sha256};

const NAME: &str = "folder/weights.bin";
const BYTES: usize = 100_000;

/// The first `count` requests of a kind are answered with `act`.
fn first(server: &Server, at: At, count: usize, act: Act) {
    let mut left = count;
    server.script(move |request| {
        let hit = request.at == at && left > 0;
        left -= usize::from(hit);
        hit.then(|| act.clone())
    });
}

#[test]
fn a_busy_server_is_asked_again() {
    for code in [408, 429, 500, 502, 503, 504] {
        for at in [At::Hub, At::Storage] {
            let (server, contents) = Server::with_one(BYTES);
            let cache = Cache::new();
            first(&server, at, 3, Act::status(code, &[]));
            cache.pull_one(&server, 3).unwrap_or_else(|e| panic!("{code}: {e}"));
            cache.has(NAME, &contents);

            let cache = Cache::new();
            first(&server, at, 3, Act::status(code, &[]));
            let code = format!("status {code}");
            refused(
                cache.pull_one(&server, 2),
                8,
                &[&code, "given up after 3 tries", "pull again"],
            );
            cache.lacks(NAME);
        }
    }
    // What is wrong with the request does not get better.
    let (server, _) = Server::with_one(BYTES);
    first(&server, At::Hub, 1, Act::status(400, &[("X-Error-Message", "no such thing")]));
    let told = ["status 400", "no such thing", "HF_ENDPOINT"];
    refused(Cache::new().pull_one(&server, 3), 8, &told);
    assert_eq!(server.log().len(), 1);
}

#[test]
fn retry_after_is_respected() {
    for code in [429, 503] {
        let (server, contents) = Server::with_one(BYTES);
        let cache = Cache::new();
        first(&server, At::Hub, 1, Act::status(code, &[("Retry-After", "1")]));
        let begun = Instant::now();
        cache.pull_one(&server, 1).expect("after the pause");
        assert!(begun.elapsed() >= Duration::from_secs(1));
        cache.has(NAME, &contents);
    }
    // Nobody waits an hour for a command.
    let (server, _) = Server::with_one(BYTES);
    first(&server, At::Hub, 1, Act::status(429, &[("Retry-After", "3600")]));
    refused(Cache::new().pull_one(&server, 5), 8, &["status 429", "wait 3600 seconds"]);
    // A date is not understood, and no reason to give up.
    let (server, _) = Server::with_one(BYTES);
    let date = [("Retry-After", "Wed, 21 Oct 2026 07:28:00 GMT")];
    first(&server, At::Hub, 1, Act::status(429, &date));
    Cache::new().pull_one(&server, 1).expect("after the usual pause");
}

#[test]
fn the_token_stays_with_the_hub() {
    let (server, contents) = Server::with_one(BYTES);
    let cache = Cache::new();
    let hub = cache.hub_with_token(&server, "hf_secret");
    hub.pull(&manifest(&[NAME]), &options(0), &mut Told::default()).expect("pulled");
    cache.has(NAME, &contents);
    let log = server.log();
    assert!(log.iter().any(|r| r.at == At::Storage), "the file came from the other host");
    for request in &log {
        let expected = (request.at == At::Hub).then_some("Bearer hf_secret");
        assert_eq!(request.token.as_deref(), expected, "{request:?}");
    }
    // Nor is it told when something goes wrong there.
    first(&server, At::Storage, 9, Act::status(500, &[]));
    let hub = Cache::new().hub_with_token(&server, "hf_secret");
    let text =
        refused(hub.pull(&manifest(&[NAME]), &options(0), &mut Told::default()), 8, &["500"]);
    assert!(!text.contains("secret"), "neither token nor signature: {text}");
}

#[test]
fn redirects() {
    let (server, contents) = Server::with_one(BYTES);
    // Another name on the same host, as for a renamed repository: relative, and followed.
    let cache = Cache::new();
    let moved = format!("/owner/renamed/resolve/{COMMIT}/{NAME}");
    let target = moved.clone();
    server.script(move |request| {
        let old = request.path.starts_with("/owner/name/");
        old.then(|| Act::status(307, &[("Location", &target)]))
    });
    let hub = cache.hub_with_token(&server, "hf_secret");
    hub.pull(&manifest(&[NAME]), &options(0), &mut Told::default()).expect("pulled");
    cache.has(NAME, &contents);
    let renamed = server.log().into_iter().find(|r| r.path == moved).expect("followed");
    assert!(renamed.token.is_some(), "the same host");

    // In a circle, on and on, and to places that are none.
    let hops = |location: &'static str| {
        move |request: &crate::server::Request| {
            let next = location.replace("N", &request.number.to_string());
            Some(Act::status(302, &[("Location", &next)]))
        }
    };
    let cases = [
        ("/a", "in a circle"),
        ("/aN", "more than 10 times"),
        ("ftp://host/x", "no usable address"),
        ("file:///etc/passwd", "no usable address"),
        ("", "no usable address"),
        ("http://user:password@127.0.0.1/", "no usable address"),
    ];
    for (location, told) in cases {
        let (server, _) = Server::with_one(BYTES);
        let cache = Cache::new();
        server.script(hops(location));
        refused(cache.pull_one(&server, 3), 8, &[told, "HF_ENDPOINT"]);
        cache.lacks(NAME);
        assert!(server.log().len() <= 12, "{location}: {}", server.log().len());
    }
    let (server, _) = Server::with_one(BYTES);
    server.script(|_| Some(Act::status(302, &[])));
    refused(Cache::new().pull_one(&server, 3), 8, &["no usable address"]);
}

#[test]
fn a_login_page_is_no_file() {
    let page = || {
        let kind = vec![("Content-Type".to_owned(), "text/html; charset=utf-8".to_owned())];
        Act::Answer(200, kind, b"<html>Please log in</html>".to_vec())
    };
    for at in [At::Hub, At::Storage] {
        let (server, _) = Server::with_one(BYTES);
        let cache = Cache::new();
        first(&server, at, 9, page());
        refused(cache.pull_one(&server, 3), 8, &["a web page, not a file", "login page"]);
        cache.lacks(NAME);
    }
    let (server, _) = Server::with_one(BYTES);
    first(&server, At::Hub, 9, page());
    let name: ModelName = "owner/name".parse().expect("a name");
    let error = Cache::new().hub(&server).manifest(&name, None).expect_err("a page");
    assert_eq!(error.kind().exit_code(), 8);
    // Neither is something else that is no listing.
    for body in [&b"{}"[..], b"[1]", b"", b"{\"sha\": \"../x\", \"siblings\": []}"] {
        let kind = vec![("Content-Type".to_owned(), "application/json".to_owned())];
        first(&server, At::Hub, 9, Act::Answer(200, kind, body.to_vec()));
        let error = Cache::new().hub(&server).manifest(&name, None).expect_err("no listing");
        assert_eq!(error.kind().exit_code(), 8, "{error}");
    }
}

#[test]
fn what_may_not_be_read_says_how_it_may() {
    let gated = [("X-Error-Code", "GatedRepo"), ("X-Error-Message", "Access is restricted")];
    for (code, headers, token, parts) in [
        (401, &gated[..], false, ["accept it at http", "set HF_TOKEN", "Access is restricted"]),
        (403, &gated[..], true, ["accept its licence at", "account of your token", "403"]),
        (401, &[][..], false, ["check the name", "set HF_TOKEN", "401"]),
        (401, &[][..], true, ["check the name", "expired", "owner/name"]),
    ] {
        let (server, _) = Server::with_one(BYTES);
        let cache = Cache::new();
        first(&server, At::Hub, 9, Act::status(code, headers));
        let hub =
            if token { cache.hub_with_token(&server, "hf_secret") } else { cache.hub(&server) };
        let result = hub.pull(&manifest(&[NAME]), &options(3), &mut Told::default());
        let text = refused(result, 8, &parts);
        assert!(!text.contains("secret") && server.log().len() == 1, "{text}");
        cache.lacks(NAME);
    }
    let (server, _) = Server::with_one(BYTES);
    for (error_code, told) in [
        ("EntryNotFound", "has no such file"),
        ("RevisionNotFound", "has no such revision"),
        ("RepoNotFound", "there is no owner/name on the hub"),
    ] {
        first(&server, At::Hub, 9, Act::status(404, &[("X-Error-Code", error_code)]));
        refused(Cache::new().pull_one(&server, 3), 8, &[told, "check the name"]);
    }
    // A signed address that ran out is asked for again.
    let (server, contents) = Server::with_one(BYTES);
    let cache = Cache::new();
    first(&server, At::Storage, 1, Act::status(403, &[]));
    cache.pull_one(&server, 1).expect("with a new address");
    cache.has(NAME, &contents);
}

#[test]
fn a_file_is_not_taken_without_a_hash_or_against_a_pinned_one() {
    let (server, contents) = Server::with_one(BYTES);
    for headers in [&[][..], &[("ETag", "\"abc-12\"")], &[("X-Linked-Etag", "\"../../x\"")]] {
        let cache = Cache::new();
        first(&server, At::Hub, 9, Act::status(200, headers));
        refused(cache.pull_one(&server, 0), 8, &["no hash", "HF_ENDPOINT"]);
        assert!(cache.blobs().is_empty());
    }
    let pinned = |bytes: Option<u64>, hash: &str| {
        let mut manifest = manifest(&[NAME]);
        (manifest.files[0].bytes, manifest.files[0].sha256) = (bytes, Some(hash.to_owned()));
        manifest
    };
    let pull = |cache: &Cache, bytes, hash: &str| {
        cache.hub(&server).pull(&pinned(bytes, hash), &options(0), &mut Told::default())
    };
    server.no_script();
    let right = sha256(&contents);
    let cache = Cache::new();
    pull(&cache, Some(BYTES as u64), &right).expect("the pinned file");
    cache.has(NAME, &contents);
    for (bytes, hash) in [(None, sha256(b"other")), (Some(BYTES as u64 + 1), right.clone())] {
        let cache = Cache::new();
        server.forget();
        refused(pull(&cache, bytes, &hash), 8, &["is not the published file", "OWNER/NAME"]);
        cache.lacks(NAME);
        assert_eq!(server.sent(), 0, "noticed before anything is downloaded");
    }
    // A server that claims the pinned hash and sends something else.
    let cache = Cache::new();
    let wrong = std::sync::Arc::new(noise(BYTES + 1)[..BYTES].to_vec());
    first(&server, At::Storage, 9, Act::Contents(wrong));
    refused(pull(&cache, None, &right), 8, &["was not downloaded right", &right]);
    cache.lacks(NAME);
    // What lies in the cache under the name of another hash is not taken for the pinned file.
    server.no_script();
    let cache = Cache::new();
    cache.pull_one(&server, 0).expect("pulled");
    refused(pull(&cache, None, &sha256(b"other")), 8, &["is not the published file"]);
}

#[test]
fn no_server_at_all() {
    let (server, contents) = Server::with_one(BYTES);
    let cache = Cache::new();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr());
    let endpoint = format!("http://{}", closed.expect("an address"));
    let hub = Hub::new(Settings { endpoint, ..cache.settings(&server) });
    let result = hub.pull(&manifest(&[NAME]), &options(1), &mut Told::default());
    refused(result, 8, &["cannot read from", "given up after 2 tries", "check the connection"]);

    let offline = Settings { offline: true, ..cache.settings(&server) };
    let offline = Hub::new(offline);
    let pull = || offline.pull(&manifest(&[NAME]), &options(1), &mut Told::default());
    refused(pull(), 8, &["HF_HUB_OFFLINE", NAME]);
    cache.pull_one(&server, 0).expect("pulled");
    server.forget();
    pull().expect("complete without a network");
    assert!(server.log().is_empty());
    cache.has(NAME, &contents);
}

#[test]
fn the_binary_tells_the_same_with_its_exit_code() {
    let (server, _) = Server::with_one(BYTES);
    server.script(|_| Some(Act::status(404, &[])));
    let cache = Cache::new();
    cache.run(&server, &["pull", "owner/name"]).fails(8, &["there is no owner/name", "hint: "]);
    cache.run(&server, &["pull", "sd3"]).fails(2, &["no model \"sd3\"", "miniflux-768p"]);
    cache.run(&server, &["pull", "../x/y"]).fails(2, &["hint: "]);
    cache.run(&server, &["pull", "sd3-768p", "--variant", "384p"]).fails(2, &["has no 384p"]);
    server.no_script();
    cache.run(&server, &["pull", "owner/name"]).fails(4, &["no Pyramid Flow checkpoint"]);
    let mut command = cache.command(&server, &["pull", "owner/name"]);
    command.env("HF_TOKEN", "hf_se cret");
    let ran = Ran::new(command).fails(2, &["is not a token"]);
    assert!(!ran.err.contains("cret\""), "{}", ran.err);
}
