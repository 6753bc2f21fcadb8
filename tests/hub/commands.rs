//! The commands, as typed: pull, list, verify, rm, and names for `--model`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use pyraflow::hub::{Hub, ModelName, Outcome, PullOptions, Settings};
use serde_json::Value;

use crate::harness::{Cache, Ran, Told, checkpoint};
use crate::server::{COMMIT, Server, sha256};

const REPO: &str = "owner/name";
const VAE: &str = "causal_video_vae/diffusion_pytorch_model.bin";
const CLIP: &str = "text_encoder/model.safetensors";

/// A small video from a model in the cache.
fn generate<'a>(model: &'a str, output: &'a str) -> Vec<&'a str> {
    let fixed = "generate fox --size 64x64 --units 1 --steps 1 --seed 1 --device cpu -q -y --force";
    let mut args: Vec<&str> = fixed.split(' ').collect();
    args.extend(["--model", model, "-o", output]);
    args
}

fn length(path: impl AsRef<Path>) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// Puts a checkpoint into the cache as another client would have done.
fn install(cache: &Cache, repo: &str, commit: &str, family: &str, rename: Option<&str>) {
    let root = cache.path().join("hub").join(format!("models--{}", repo.replace('/', "--")));
    for (path, contents) in checkpoint(family) {
        let path = match rename {
            Some(variant) => path.replace("transformer_768p", &format!("transformer_{variant}")),
            None => path,
        };
        let blob = root.join("blobs").join(crate::server::etag(&contents));
        fs::create_dir_all(root.join("blobs")).expect("a folder");
        fs::write(&blob, &*contents).expect("written");
        let link = root.join("snapshots").join(commit).join(path);
        fs::create_dir_all(link.parent().expect("a folder")).expect("a folder");
        let _ = fs::remove_file(&link);
        symlink(Path::new("../../../blobs").join(blob.file_name().expect("a name")), &link)
            .expect("a link");
    }
}

#[test]
fn pulled_generated_with_verified_and_removed() {
    let server = Server::new(checkpoint("flux"));
    let cache = Cache::new();
    let none = cache.run(&server, &generate(REPO, "a.png"));
    none.fails(4, &["no folder owner/name", "pyraflow pull owner/name"]);

    let pulled = cache.run(&server, &["pull", REPO, "--json"]).ok().events();
    let of = |kind: &str| -> Vec<&Value> { pulled.iter().filter(|e| e["event"] == kind).collect() };
    let files = checkpoint("flux");
    assert_eq!(of("start")[0]["files"], files.len());
    assert_eq!(of("start")[0]["commit"], COMMIT);
    assert_eq!(of("file").len(), files.len());
    assert!(of("file").iter().all(|file| file["outcome"] == "downloaded"));
    let progress = of("progress");
    let stages: Vec<_> = progress.iter().map(|e| e["stage"].as_str().expect("a stage")).collect();
    assert!(stages.contains(&"downloading") && stages.contains(&"converting"), "{stages:?}");
    let rates = progress.iter().map(|event| event["bytes_per_second"].as_f64().expect("a rate"));
    assert!(rates.fold(0.0, f64::max) > 0.0);
    let done = of("done")[0];
    assert_eq!(done["downloaded"], files.len());
    assert_eq!(PathBuf::from(done["folder"].as_str().expect("a folder")), cache.file(""));

    // What was converted is gone, what is used as published stays.
    let gone: Vec<&String> = files.keys().filter(|path| !cache.file(path).exists()).collect();
    assert!(gone.iter().any(|path| *path == VAE), "{gone:?}");
    assert!(gone.iter().all(|path| path.contains("model")), "{gone:?}");
    assert!(cache.file(CLIP).exists(), "CLIP is published in bf16");
    assert!(done["removed"].as_u64().expect("bytes") > 0);
    for path in gone {
        let folder = path.split('/').next().expect("a folder");
        assert!(cache.file(&format!(".pyraflow/{folder}.safetensors")).is_file(), "{path}");
        let blob = sha256(&files[path]);
        assert!(!cache.blobs().contains(&blob), "the blob of {path} is gone, too");
    }

    // The same video as from the published files.
    cache.run(&server, &generate(REPO, "pulled.png")).ok();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/flux");
    let golden = golden.to_str().expect("a path");
    let mut direct = generate(golden, "direct.png");
    direct.extend(["--store", "store"]);
    cache.run(&server, &direct).ok();
    let picture = |name: &str| fs::read(cache.path().join(name)).expect("a picture");
    assert!(picture("pulled.png") == picture("direct.png"));

    // Nothing is fetched again.
    server.forget();
    let again = cache.run(&server, &["pull", REPO]).ok();
    assert_eq!(server.sent(), 0, "{again:?}");
    assert!(again.err.contains("use it with: pyraflow generate --model owner/name"), "{again:?}");

    let shown = cache.run(&server, &["inspect", "--model", REPO]).ok();
    assert!(shown.out.contains("miniflux checkpoint with 768p"), "{shown:?}");
    assert!(!shown.out.contains("missing") && !shown.out.contains("problem"), "{shown:?}");
    assert_eq!(cache.run(&server, &["inspect", REPO]).ok().out, shown.out);
    cache.run(&server, &["plan", "--model", REPO, "--units", "2"]).ok();
    let list = cache.run(&server, &["list"]).ok().out;
    assert!(list.lines().any(|l| l.starts_with("owner/name") && l.contains("B")), "{list}");
    let verified = cache.run(&server, &["verify", REPO, "--values"]).ok().out;
    assert!(verified.contains("checksum of the conversion"), "{verified}");
    assert!(verified.contains("the server's hash"), "{verified}");

    let removed = cache.run(&server, &["rm", REPO]).ok();
    assert!(removed.err.contains("removed owner/name"), "{removed:?}");
    assert!(!cache.path().join("hub/models--owner--name").exists());
    cache.run(&server, &["rm", REPO]).fails(4, &["is not in", "pyraflow list"]);
    cache.run(&server, &["verify", REPO]).fails(4, &["pyraflow pull owner/name"]);
}

#[test]
fn originals_are_kept_if_asked_for_or_not_ours() {
    let server = Server::new(checkpoint("flux"));
    let cache = Cache::new();
    cache.run(&server, &["pull", REPO, "--keep-original", "-q"]).ok();
    for (path, contents) in checkpoint("flux") {
        cache.has(&path, &contents);
    }
    assert!(cache.file(".pyraflow/causal_video_vae.safetensors").is_file());
    // The next pull without the option removes them, and fetches nothing for that.
    server.forget();
    cache.run(&server, &["pull", REPO, "-q"]).ok();
    assert_eq!(server.sent(), 0);
    cache.lacks(VAE);
    // And with it again, they come back.
    cache.run(&server, &["pull", REPO, "--keep-original", "-q"]).ok();
    cache.has(VAE, &checkpoint("flux")[VAE]);

    // What another program downloaded is used, checked, converted, and left alone.
    let cache = Cache::new();
    install(&cache, REPO, COMMIT, "flux", None);
    server.forget();
    let ran = cache.run(&server, &["pull", REPO, "--json"]).ok();
    assert_eq!(server.sent(), 0);
    let present = |e: &Value| e["event"] == "file" && e["outcome"] == "present";
    assert_eq!(ran.events().iter().filter(|e| present(e)).count(), checkpoint("flux").len());
    for (path, contents) in checkpoint("flux") {
        cache.has(&path, &contents);
    }
    // Unless it is damaged.
    let blob = fs::canonicalize(cache.file(VAE)).expect("a blob");
    let mut bytes = fs::read(&blob).expect("a file");
    bytes[5000] ^= 1;
    fs::write(&blob, bytes).expect("written");
    let ran = cache.run(&server, &["pull", REPO]).ok();
    assert!(ran.err.contains("is damaged and is fetched again"), "{ran:?}");
    assert_eq!(server.sent(), checkpoint("flux")[VAE].len() as u64);
}

#[test]
fn verify_finds_damage_and_pull_repairs_it() {
    let server = Server::new(checkpoint("flux"));
    let cache = Cache::new();
    cache.run(&server, &["pull", REPO, "-q"]).ok();
    let flip = |path: PathBuf, at: usize| {
        let times = fs::metadata(&path).and_then(|m| m.modified()).expect("a time");
        let mut bytes = fs::read(&path).expect("a file");
        let at = bytes.len() - at;
        bytes[at] ^= 1;
        // In place, with the time of change as before: only reading it all tells.
        fs::write(&path, bytes).expect("written");
        let file = fs::File::options().append(true).open(&path).expect("a file");
        file.set_modified(times).expect("set");
    };
    let stored = ".pyraflow/causal_video_vae.safetensors";
    for name in [CLIP, "tokenizer/vocab.json", stored] {
        flip(fs::canonicalize(cache.file(name)).expect("a file"), 100);
        let told = cache.run(&server, &["verify", REPO]);
        let told = told.fails(4, &["1 of", "are not right", "pyraflow pull owner/name"]);
        assert!(told.out.contains(&format!("DAMAGED   {name}")), "{told:?}");
        cache.run(&server, &["pull", REPO, "-q"]).ok();
        cache.run(&server, &["verify", REPO]).ok();
    }
    fs::remove_file(cache.file("tokenizer/vocab.json")).expect("removed");
    let told = cache.run(&server, &["verify", REPO, "--json"]).fails(4, &["1 of"]);
    assert!(told.out.contains("\"verdict\": \"missing\""), "{told:?}");
    cache
        .run(&server, &generate(REPO, "a.png"))
        .fails(4, &["tokenizer/vocab.json", "pyraflow pull"]);
    cache.run(&server, &["pull", REPO, "-q"]).ok();

    // A folder by itself: what it is held to is not known, its values are.
    let folder = cache.path().join("copy");
    for (path, contents) in checkpoint("flux") {
        let path = folder.join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, &*contents).expect("written");
    }
    let told = cache.run(&server, &["verify", "copy", "--values"]).ok().out;
    assert!(told.contains(&format!("unknown   {CLIP}")), "{told}");
    assert!(told.contains(&sha256(&checkpoint("flux")[CLIP])), "{told}");
    let mut weights = checkpoint("flux")[CLIP].to_vec();
    let end = weights.len();
    weights[end - 2..].copy_from_slice(&half::bf16::NAN.to_le_bytes());
    fs::write(folder.join(CLIP), weights).expect("written");
    cache.run(&server, &["verify", "copy"]).ok();
    let told = cache.run(&server, &["verify", "copy", "--values"]).fails(4, &["1 of"]);
    assert!(told.out.contains("NaN or infinite: 1 of"), "{told:?}");
    cache.run(&server, &["verify", "nowhere"]).fails(4, &["no checkpoint folder nowhere"]);
}

/// The pinned hashes cannot be got around by another server.
#[test]
fn a_published_name_takes_the_published_files_only() {
    // The right names, small wrong contents.
    let files = checkpoint("flux").into_iter().map(|(path, contents)| {
        let path = path.replace("transformer_768p", "transformer_384p");
        (path, contents)
    });
    let mut files: crate::server::Files = files.collect();
    for name in "miniflux-384p".parse::<ModelName>().map(published).expect("a name") {
        files.entry(name).or_insert_with(|| std::sync::Arc::new(vec![1; 5000]));
    }
    let server = Server::new(files);
    let cache = Cache::new();
    let ran = cache.run(&server, &["pull", "miniflux-384p"]);
    ran.fails(8, &["is not the published file", "pull it as OWNER/NAME"]);
    assert_eq!(server.sent(), 0);
    let log = server.log();
    let commit = "dd0ab8f28f5376e25a17661ce1a6c92ba5b4fda9";
    assert!(log.iter().all(|r| r.path.starts_with("/rain1011/pyramid-flow-miniflux/resolve/")));
    assert!(log.iter().all(|r| r.path.contains(commit)), "the pinned commit");
    let list = cache.run(&server, &["list"]).ok().out;
    assert!(list.lines().any(|l| l.starts_with("miniflux-384p") && l.ends_with('-')), "{list}");
    cache
        .run(&server, &generate("miniflux-384p", "a.png"))
        .fails(4, &["miniflux-384p is not in", "pyraflow pull miniflux-384p"]);
}

fn published(name: ModelName) -> Vec<String> {
    let nowhere = Settings {
        endpoint: "http://127.0.0.1:1".to_owned(),
        cache: PathBuf::from("/nonexistent"),
        token: None,
        offline: true,
    };
    let manifest = Hub::new(nowhere).manifest(&name, None).expect("no network is needed");
    manifest.files.into_iter().map(|file| file.path).collect()
}

/// Two variants in one snapshot, as another client would have put them there.
#[test]
fn published_names_find_shared_snapshots() {
    let server = Server::new(checkpoint("flux"));
    let cache = Cache::new();
    let repo = "rain1011/pyramid-flow-miniflux";
    let root = cache.path().join("hub/models--rain1011--pyramid-flow-miniflux");
    // At another commit than the pinned one, which is `main`.
    install(&cache, repo, COMMIT, "flux", Some("384p"));
    fs::create_dir_all(root.join("refs")).expect("a folder");
    fs::write(root.join("refs/main"), COMMIT).expect("written");
    cache.run(&server, &generate("miniflux-384p", "a.png")).ok();
    cache
        .run(&server, &generate("miniflux-768p", "a.png"))
        .fails(4, &["miniflux-768p is not in", "pyraflow pull miniflux-768p"]);
    install(&cache, repo, COMMIT, "flux", None);
    cache.run(&server, &generate("miniflux-768p", "b.png")).ok();
    let mut other = generate("miniflux-768p", "a.png");
    other.extend(["--variant", "384p"]);
    cache.run(&server, &other).fails(2, &["contradict"]);
    let states = cache.run(&server, &["list", "--json"]).ok().out;
    let states: Value = serde_json::from_str(&states).expect("JSON");
    let state = |name: &str| {
        let models = states["models"].as_array().expect("models");
        let model = models.iter().find(|model| model["name"] == name).expect("a model");
        model["state"].as_str().expect("a state").to_owned()
    };
    assert_eq!(state("miniflux-384p"), "complete");
    assert_eq!(state("miniflux-768p"), "complete");
    assert_eq!((state("miniflux-image"), state("sd3-384p")), ("absent".into(), "absent".into()));

    // One goes, and what the other needs stays.
    let snapshot = root.join("snapshots").join(COMMIT);
    let removed = cache.run(&server, &["rm", "miniflux-384p"]).ok();
    assert!(removed.err.contains("shares with miniflux-768p stays"), "{removed:?}");
    assert!(!snapshot.join("diffusion_transformer_384p").exists());
    assert!(length(snapshot.join(VAE)) > 0);
    cache.run(&server, &generate("miniflux-768p", "b.png")).ok();
    cache.run(&server, &["rm", "miniflux-768p"]).ok();
    assert!(!root.exists());
}

#[test]
fn a_model_is_used_for_what_it_was_made_for() {
    let server = Server::new(checkpoint("flux"));
    let cache = Cache::new();
    install(&cache, "rain1011/pyramid-flow-miniflux", COMMIT, "flux", None);
    let ask = |more: &[&str]| -> Ran {
        let mut args = vec!["generate", "fox", "--model", "miniflux-768p", "-o", "a.mp4"];
        args.extend(more);
        cache.run(&server, &args)
    };
    let good = ["1280x768 and 768x1280", "up to 31 latent frames (241 frames of video)", "--force"];
    let told = |what: &'static str| [&good[..], &[what]].concat();
    ask(&["--size", "384p"]).fails(3, &told("the 768p model was not made for 640x384"));
    ask(&["--units", "32"]).fails(3, &told("not made for 32 latent frames"));
    // What cannot be is told first.
    ask(&["--size", "65x64"]).fails(3, &["multiples of 64"]);
    let plan = |model: &str, more: &[&str]| {
        let mut args = vec!["plan", "--model", model];
        args.extend(more);
        cache.run(&server, &args)
    };
    plan("miniflux-image", &["--size", "640x384"]).fails(3, &["1024x1024", "a single image"]);
    plan("sd3-384p", &["--size", "768p"]).fails(3, &["640x384 and 384x640", "16 latent frames"]);
    plan("sd3-384p", &["--size", "64x64", "--units", "1", "--force"]).ok();
    plan("sd3-384p", &["--variant", "768p"]).fails(2, &["contradict"]);
}

#[test]
fn the_library_pulls_what_it_is_given() {
    let server = Server::new(checkpoint("sd3"));
    let cache = Cache::new();
    let name: ModelName = REPO.parse().expect("a name");
    let hub = cache.hub(&server);
    let manifest = hub.manifest(&name, None).expect("a listing");
    assert_eq!((manifest.revision.as_str(), manifest.reference.as_deref()), (COMMIT, Some("main")));
    let mut told = Told::default();
    let pulled = hub.pull(&manifest, &PullOptions::default(), &mut told).expect("pulled");
    assert_eq!(pulled.folder, hub.locate(&name).expect("complete"));
    assert!(told.outcomes().iter().any(|(_, outcome)| *outcome == Outcome::Downloaded));
    let reference = cache.path().join("hub/models--owner--name/refs/main");
    assert_eq!(fs::read_to_string(reference).expect("a reference"), COMMIT);
    // Equal tokenizer files of sd3 are one blob, fetched once.
    let vocabulary = |folder: &str| fs::canonicalize(cache.file(folder).join("vocab.json")).ok();
    let equal =
        checkpoint("sd3")["tokenizer/vocab.json"] == checkpoint("sd3")["tokenizer_2/vocab.json"];
    assert_eq!(vocabulary("tokenizer") == vocabulary("tokenizer_2"), equal);
    // Offline it is what was pulled.
    let offline = Hub::new(Settings { offline: true, ..cache.settings(&server) });
    let again = offline.manifest(&name, None).expect("the record");
    offline.pull(&again, &PullOptions::default(), &mut Told::default()).expect("complete");
}
