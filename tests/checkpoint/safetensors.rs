//! Damaged safetensors files and shards: an error or an unchanged result, never a panic.

use std::fs;
use std::path::Path;

use pyraflow::ErrorKind;
use pyraflow::checkpoint::{Checkpoint, Component};
use pyraflow::tensor::WeightSource;
use serde_json::json;

use super::{copy_of, replace, values};

/// A small file under the name of the VAE's weights in an otherwise golden checkpoint.
struct Bench {
    dir: tempfile::TempDir,
    checkpoint: Checkpoint,
}

impl Bench {
    fn new() -> Self {
        let dir = copy_of("sd3");
        let checkpoint = Checkpoint::open(dir.path(), None).unwrap();
        Bench { dir, checkpoint }
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("causal_video_vae/diffusion_pytorch_model.safetensors")
    }

    /// What reading these bytes gives.
    fn read(&self, bytes: &[u8]) -> Result<Values, pyraflow::Error> {
        replace(&self.path(), bytes);
        let weights = self.checkpoint.source_weights(Component::Vae)?;
        Ok(values(&weights))
    }

    fn refuse(&self, bytes: &[u8]) -> String {
        let error = self.read(bytes).expect_err("a damaged file was read");
        assert_eq!(error.kind(), ErrorKind::Model);
        assert!(error.to_string().contains("diffusion_pytorch_model"), "{error}");
        error.to_string()
    }
}

type Values = Vec<(String, Vec<usize>, Vec<u32>)>;

fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// Two tensors, one of each of two types.
fn small() -> Vec<u8> {
    let header = json!({
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [8, 14]},
    });
    file(&header.to_string(), &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14])
}

#[test]
fn every_truncation_is_refused() {
    let bench = Bench::new();
    let whole = small();
    assert_eq!(bench.read(&whole).unwrap().len(), 2);
    for len in 0..whole.len() {
        bench.refuse(&whole[..len]);
    }
    bench.refuse(&[&whole[..], &[0]].concat());
}

/// A changed byte may give another valid header (another name, say), but nothing that reaches
/// outside the file.
#[test]
fn no_changed_header_byte_leads_outside_the_file() {
    let bench = Bench::new();
    let whole = small();
    let header = whole.len() - 14;
    for at in 0..header {
        for flip in [0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] ^= flip;
            match bench.read(&bytes) {
                // Reading the values has touched every byte they claim.
                Ok(values) => assert!(values.len() <= 2),
                Err(error) => assert_eq!(error.kind(), ErrorKind::Model),
            }
        }
    }
}

#[test]
fn lengths_offsets_and_types_that_lie_are_refused() {
    let bench = Bench::new();
    for length in [0, 7, 1 << 63, u64::MAX, small().len() as u64, 100_000_001] {
        let mut bytes = small();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        bench.refuse(&bytes);
    }
    let one = |dtype: &str, shape: serde_json::Value, offsets: [u64; 2]| {
        json!({"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).to_string()
    };
    let data = [0; 16];
    for header in [
        one("F32", json!([4]), [0, 12]),
        one("F32", json!([4]), [16, 0]),
        one("F32", json!([4]), [4, 20]),
        one("F32", json!([3]), [4, 16]),
        one("F32", json!([-4]), [0, 16]),
        one("F32", json!([1u64 << 62]), [0, 0]),
        one("F32", json!([1u64 << 32, 1u64 << 32]), [0, 0]),
        one("F32", json!([u64::MAX, 2]), [0, 16]),
        one("F31", json!([4]), [0, 16]),
        // Two tensors over each other, and a duplicate that leaves a hole.
        r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},
            "b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#
            .to_owned(),
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
            "a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#
            .to_owned(),
        "[".repeat(10_000),
        "\u{0}".to_owned(),
    ] {
        bench.refuse(&file(&header, &data));
    }
    // Types that the format has but no weight does are named.
    let text = bench.refuse(&file(&one("I64", json!([2]), [0, 16]), &data));
    assert!(text.contains("I64") && text.contains("\"t\""), "{text}");
    // No metadata at all is fine: miniflux has none.
    assert_eq!(bench.read(&file(&one("F16", json!([8]), [0, 16]), &data)).unwrap().len(), 1);
}

#[test]
fn a_folder_in_place_of_a_file_is_no_panic() {
    let bench = Bench::new();
    fs::remove_file(bench.path()).unwrap();
    fs::create_dir(bench.path()).unwrap();
    let error = bench.checkpoint.source_weights(Component::Vae).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Model);
}

/// Opens the T5 of a golden copy after `damage` to its folder.
fn damaged_t5(damage: impl Fn(&Path)) -> pyraflow::Error {
    let dir = copy_of("sd3");
    damage(&dir.path().join("text_encoder_3"));
    let checkpoint = Checkpoint::open(dir.path(), None).unwrap();
    let error = checkpoint.source_weights(Component::T5).expect_err("damage was not noticed");
    assert_eq!(error.kind(), ErrorKind::Model);
    error
}

fn edit_index(folder: &Path, edit: impl Fn(&mut serde_json::Map<String, serde_json::Value>)) {
    let path = folder.join("model.safetensors.index.json");
    let mut index: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    edit(index["weight_map"].as_object_mut().unwrap());
    fs::write(path, index.to_string()).unwrap();
}

#[test]
fn shards_and_index_must_agree() {
    let error = damaged_t5(|folder| {
        for shard in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
            fs::remove_file(folder.join(shard)).unwrap();
        }
    });
    let text = error.to_string();
    assert!(text.contains("2 of 2") && text.contains("00001") && text.contains("00002"), "{text}");

    let error = damaged_t5(|folder| {
        edit_index(folder, |map| {
            map.remove("shared.weight");
            map.insert("extra".into(), "model-00002-of-00002.safetensors".into());
        });
    });
    let text = error.to_string();
    assert!(text.contains("shared.weight is in") && text.contains("extra is not in"), "{text}");

    let error = damaged_t5(|folder| {
        edit_index(folder, |map| {
            map.insert("shared.weight".into(), "model-00002-of-00002.safetensors".into());
        });
    });
    assert!(error.to_string().contains("shared.weight"), "{error}");

    damaged_t5(|folder| {
        fs::write(folder.join("model.safetensors.index.json"), "{\"weight_map\": 3}").unwrap();
    });
}

#[test]
fn shard_names_cannot_leave_the_folder() {
    for name in [
        "../model.safetensors",
        "/etc/x.safetensors",
        "a\\b.safetensors",
        "..",
        "",
        "a\0.safetensors",
        "config.json",
    ] {
        let error = damaged_t5(|folder| {
            edit_index(folder, |map| drop(map.insert("shared.weight".into(), name.into())));
        });
        assert!(error.to_string().contains("not the name of a shard"), "{name:?}: {error}");
    }
}

/// sd3's published VAE is safetensors; with both files there, it is the one used.
#[test]
fn safetensors_come_before_bin() {
    let bench = Bench::new();
    fs::write(bench.path().with_extension("bin"), "no archive").unwrap();
    bench.checkpoint.source_weights(Component::Vae).unwrap();
    fs::remove_file(bench.path()).unwrap();
    let error = bench.checkpoint.source_weights(Component::Vae).unwrap_err();
    assert!(error.to_string().contains("zip"), "{error}");
    fs::write(bench.path(), small()).unwrap();
    let weights = bench.checkpoint.source_weights(Component::Vae).unwrap();
    assert!(weights.weight("a.weight").is_ok());
}
