//! The bf16 store: exact, reused, renewed, and never half written.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, SystemTime};

use pyraflow::checkpoint::{Checkpoint, Component, ComponentWeights, StoreOptions};
use pyraflow::tensor::{DType, WeightSource};
use pyraflow::{Error, ErrorKind, Result};

use super::{components, copy_of, golden, goldens, values};

/// Opens a component; returns it and whether it was converted now.
fn open(
    checkpoint: &Checkpoint,
    component: Component,
    options: &StoreOptions,
) -> Result<(ComponentWeights, bool)> {
    let mut written = false;
    let weights = checkpoint.open_weights(component, options, &mut |_, _| {
        written = true;
        Ok(())
    })?;
    Ok((weights, written))
}

fn path(weights: &ComponentWeights) -> &Path {
    let mut paths = weights.paths();
    let path = paths.next().unwrap();
    assert!(paths.next().is_none(), "one file");
    path
}

fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .map(|entries| entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect())
        .unwrap_or_default();
    names.sort();
    names
}

#[test]
fn goldens_are_converted_without_a_change_of_value() {
    for dir in goldens() {
        let store = tempfile::tempdir().unwrap();
        let options = StoreOptions::below(store.path());
        let checkpoint = Checkpoint::open(&dir, None).unwrap();
        for component in components(&checkpoint) {
            let source = checkpoint.source_weights(component).unwrap();
            let (stored, written) = open(&checkpoint, component, &options).unwrap();
            assert_eq!(values(&stored), values(&source), "{component}");
            for (name, view) in stored.iter() {
                let table = name == "pos_embed.pos_embed";
                assert_eq!(view.dtype == DType::F32, table, "{name}");
            }
            let in_place = source.paths().count() == 1
                && path(&source).extension().is_some_and(|e| e == "safetensors")
                && source.iter().all(|(n, v)| {
                    v.dtype == DType::Bf16 || n == "pos_embed.pos_embed" && v.dtype == DType::F32
                });
            assert_eq!(written, !in_place, "{component}");
            assert_eq!(path(&stored).starts_with(store.path()), written);
            stored.check_contents().unwrap();
            stored.check_unchanged().unwrap();

            let (again, written) = open(&checkpoint, component, &options).unwrap();
            assert!(!written, "{component} is converted once");
            assert_eq!(path(&again), path(&stored));
        }
    }
}

/// Whole lines of 64 bytes are aligned, and q, k, v follow each other.
#[test]
fn the_layout_suits_streaming() {
    let store = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&golden("flux"), None).unwrap();
    let options = StoreOptions::below(store.path());
    let (weights, _) = open(&checkpoint, Component::Transformer, &options).unwrap();
    for (name, view) in weights.iter() {
        let align = if view.bytes.len() % 64 == 0 { 64 } else { view.dtype.bytes() };
        assert_eq!(view.bytes.as_ptr().addr() % align, 0, "{name}");
    }
    let range = |name: &str| weights.weight(name).unwrap().bytes.as_ptr_range();
    for kind in ["weight", "bias"] {
        let mut end = None;
        for module in ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"] {
            let range = range(&format!("single_transformer_blocks.0.{module}.{kind}"));
            assert!(end.is_none_or(|end| end == range.start), "{module}.{kind}");
            end = Some(range.end);
        }
    }
    // The tensors of a block fill one range without gaps.
    let block: Vec<_> =
        weights.iter().filter(|(name, _)| name.starts_with("transformer_blocks.0.")).collect();
    let start = block.iter().map(|(_, v)| v.bytes.as_ptr().addr()).min().unwrap();
    let end = block.iter().map(|(_, v)| v.bytes.as_ptr_range().end.addr()).max().unwrap();
    assert_eq!(end - start, block.iter().map(|(_, v)| v.bytes.len()).sum::<usize>());
}

#[test]
fn a_changed_source_or_a_damaged_store_is_converted_again() {
    let copy = copy_of("flux");
    let checkpoint = Checkpoint::open(copy.path(), None).unwrap();
    let options = StoreOptions { directory: None, cache: None };
    let vae = |expect_written| {
        let (weights, written) = open(&checkpoint, Component::Vae, &options).unwrap();
        assert_eq!(written, expect_written);
        path(&weights).to_path_buf()
    };
    let stored = vae(true);
    assert!(stored.starts_with(copy.path().join(".pyraflow")));
    vae(false);

    // Another modification time.
    let source = copy.path().join("causal_video_vae/diffusion_pytorch_model.bin");
    let file = File::options().append(true).open(&source).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(1000)).unwrap();
    vae(true);
    vae(false);

    // A store that is cut short, or is no store at all.
    let whole = fs::read(&stored).unwrap();
    for damaged in [&whole[..whole.len() - 1], &whole[..100], b"junk"] {
        fs::remove_file(&stored).unwrap();
        fs::write(&stored, damaged).unwrap();
        vae(true);
        assert_eq!(fs::read(&stored).unwrap(), whole, "conversion is deterministic");
    }

    // A flipped bit of the contents is for `check_contents` to find.
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    fs::remove_file(&stored).unwrap();
    fs::write(&stored, flipped).unwrap();
    let (weights, _) = open(&checkpoint, Component::Vae, &options).unwrap();
    let error = weights.check_contents().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Model);
    assert!(error.hint_text().unwrap().contains("delete"), "{error}");
    assert_eq!(names_in(&copy.path().join(".pyraflow")), ["causal_video_vae.safetensors"]);
}

#[test]
fn an_unwritable_checkpoint_uses_the_cache() {
    let copy = copy_of("flux");
    // A file in the folder's place: what a read-only checkpoint is to a test run by root.
    fs::write(copy.path().join(".pyraflow"), "").unwrap();
    let checkpoint = Checkpoint::open(copy.path(), None).unwrap();
    let cache = tempfile::tempdir().unwrap();
    let options = StoreOptions { directory: None, cache: Some(cache.path().to_path_buf()) };
    let (weights, written) = open(&checkpoint, Component::Vae, &options).unwrap();
    assert!(written && path(&weights).starts_with(cache.path().join("pyraflow")));
    let (_, written) = open(&checkpoint, Component::Vae, &options).unwrap();
    assert!(!written);

    let nowhere = StoreOptions { directory: None, cache: None };
    let error = open(&checkpoint, Component::Vae, &nowhere).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains(".pyraflow") && error.hint_text().is_some(), "{error}");
}

#[test]
fn two_checkpoints_can_share_a_folder() {
    let shared = tempfile::tempdir().unwrap();
    let options = StoreOptions::below(shared.path());
    let copies = [copy_of("flux"), copy_of("flux")];
    let paths = copies.each_ref().map(|copy| {
        let checkpoint = Checkpoint::open(copy.path(), None).unwrap();
        let (weights, written) = open(&checkpoint, Component::ClipL, &options).unwrap();
        // miniflux's CLIP is published in bf16: nothing to convert.
        assert!(!written && path(&weights).starts_with(copy.path()));
        let (weights, written) = open(&checkpoint, Component::Vae, &options).unwrap();
        assert!(written);
        path(&weights).to_path_buf()
    });
    assert_ne!(paths[0], paths[1]);
}

#[test]
fn an_interrupted_conversion_leaves_nothing() {
    let store = tempfile::tempdir().unwrap();
    let options = StoreOptions::below(store.path());
    let checkpoint = Checkpoint::open(&golden("flux"), None).unwrap();
    let mut last = (0, 0);
    checkpoint
        .open_weights(Component::Vae, &options, &mut |done, total| {
            assert!(last.0 <= done && done <= total && (last.1 == total || last.1 == 0));
            last = (done, total);
            Ok(())
        })
        .unwrap();
    assert!(last.0 == last.1 && last.1 > 0, "progress ends at the total");
    let folder = store.path().join(&names_in(store.path())[0]);
    fs::remove_dir_all(&folder).unwrap();

    for stop_at in [0, 1, last.1 / 2, last.1] {
        let error = checkpoint
            .open_weights(Component::Vae, &options, &mut |done, _| {
                if done >= stop_at { Err(Error::interrupted("stopped")) } else { Ok(()) }
            })
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Interrupted);
        assert_eq!(names_in(&folder), [""; 0], "stopped at {stop_at}");
    }
}

#[test]
fn conversions_at_the_same_time_do_not_disturb_each_other() {
    let copy = copy_of("flux");
    let options = StoreOptions { directory: None, cache: None };
    let expected = {
        let checkpoint = Checkpoint::open(copy.path(), None).unwrap();
        values(&checkpoint.source_weights(Component::Vae).unwrap())
    };
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let checkpoint = Checkpoint::open(copy.path(), None).unwrap();
                for _ in 0..3 {
                    let (weights, _) = open(&checkpoint, Component::Vae, &options).unwrap();
                    weights.check_contents().unwrap();
                    assert_eq!(values(&weights), expected);
                }
            });
        }
    });
    assert_eq!(names_in(&copy.path().join(".pyraflow")), ["causal_video_vae.safetensors"]);
}
