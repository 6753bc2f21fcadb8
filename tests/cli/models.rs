//! Checkpoints that are incomplete, damaged or mixed: refused by name of the file.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;

use crate::harness::{Bench, Generate, golden};

const TRANSFORMER: &str = "diffusion_transformer_768p/diffusion_pytorch_model.safetensors";

fn with_model(bench: &Bench) -> Generate {
    Generate::new().set("--model", bench.path("model"))
}

/// Changes a JSON file.
fn edit(path: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).expect("a file")).expect("JSON");
    change(&mut value);
    fs::write(path, value.to_string()).expect("written");
}

/// The length of a safetensors file's header, its eight length bytes included.
fn header_length(file: &[u8]) -> usize {
    let (length, _) = SafeTensors::read_metadata(file).expect("a whole file");
    8 + length
}

#[test]
fn a_folder_that_is_no_checkpoint() {
    let bench = Bench::new();
    fs::create_dir(bench.path("model")).expect("a folder");
    bench.refuses(&with_model(&bench), 4, &["holds no Pyramid Flow checkpoint"]);
    bench.refuses(&Generate::new().set("--model", "nowhere"), 4, &["no checkpoint", "nowhere"]);
    bench.write("file", "hello");
    bench.refuses(&Generate::new().set("--model", "file"), 4, &["file"]);
}

#[test]
fn every_missing_component_is_named() {
    let bench = Bench::new();
    for family in ["sd3", "flux"] {
        let parts: Vec<PathBuf> = fs::read_dir(bench.copy_model(family))
            .expect("a folder")
            .map(|e| e.expect("an entry").path())
            .collect();
        assert!(parts.len() >= 6, "{parts:?}");
        for part in parts {
            let name = part.file_name().expect("a name").to_string_lossy().into_owned();
            bench.copy_model(family);
            fs::remove_dir_all(&part).expect("removable");
            bench.refuses(&with_model(&bench), 4, &[&name]);
        }
    }
}

#[test]
fn every_missing_file_is_named_at_once() {
    let bench = Bench::new();
    let model = bench.copy_model("sd3");
    let gone = [
        "text_encoder_3/model-00002-of-00002.safetensors",
        "tokenizer/merges.txt",
        "causal_video_vae/config.json",
        "text_encoder/model.safetensors",
    ];
    for name in gone {
        fs::remove_file(model.join(name)).expect("removable");
    }
    bench.refuses(&with_model(&bench), 4, &gone);

    let model = bench.copy_model("sd3");
    edit(&model.join("text_encoder_3/model.safetensors.index.json"), |index| {
        index["weight_map"]["shared.weight"] = "model-00003-of-00002.safetensors".into();
    });
    bench.refuses(&with_model(&bench), 4, &["text_encoder_3/model-00003-of-00002.safetensors"]);
    edit(&model.join("text_encoder_3/model.safetensors.index.json"), |index| {
        index["weight_map"]["shared.weight"] = "../../../etc/passwd".into();
    });
    bench.refuses(&with_model(&bench), 4, &["text_encoder_3", "../../../etc/passwd"]);
}

#[test]
fn damaged_configurations_are_named() {
    let bench = Bench::new();
    let configs = [
        "diffusion_transformer_768p/config.json",
        "causal_video_vae/config.json",
        "text_encoder/config.json",
        "text_encoder_2/config.json",
        "text_encoder_3/config.json",
        "text_encoder_3/model.safetensors.index.json",
        "tokenizer/vocab.json",
        "tokenizer_3/tokenizer.json",
    ];
    for name in configs {
        for content in ["", "{", "[1, 2]", "{}", "\u{0}\u{1}", "<!DOCTYPE html>"] {
            let model = bench.copy_model("sd3");
            fs::write(model.join(name), content).expect("written");
            // A whole file without any words is the tokenizer's fault, not the file's.
            let named = name.strip_suffix("/vocab.json").unwrap_or(name);
            bench.refuses(&with_model(&bench), 4, &[named]);
        }
    }
    let transformer = bench.copy_model("sd3").join(configs[0]);
    for (field, value) in [
        ("num_layers", "0"),
        ("num_layers", "-1"),
        ("num_layers", "1e300"),
        ("num_attention_heads", "\"many\""),
        ("attention_head_dim", "18446744073709551615"),
    ] {
        let value: serde_json::Value = serde_json::from_str(value).expect("JSON");
        edit(&transformer, |config| config[field] = value);
        bench.refuses(&with_model(&bench), 4, &[configs[0], field]);
        bench.copy_model("sd3");
    }
}

#[test]
fn truncated_weights_are_named() {
    let bench = Bench::new();
    let path = bench.copy_model("sd3").join(TRANSFORMER);
    let whole = fs::read(&path).expect("weights");
    let header = header_length(&whole);
    let lengths = [0, 1, 7, 8, 9, 100, header / 2, header - 1, header, header + 1, whole.len() / 2];
    for length in lengths.into_iter().chain([whole.len() - 1]) {
        fs::write(&path, &whole[..length]).expect("written");
        bench.refuses(&with_model(&bench), 4, &[TRANSFORMER]);
    }
    fs::write(&path, [whole.as_slice(), b"more"].concat()).expect("written");
    bench.refuses(&with_model(&bench), 4, &[TRANSFORMER]);

    for name in [
        "causal_video_vae/diffusion_pytorch_model.bin",
        "text_encoder_2/model-00002-of-00002.safetensors",
    ] {
        let path = bench.copy_model("flux").join(name);
        let whole = fs::read(&path).expect("weights");
        for length in [0, 10, whole.len() / 3, whole.len() - 1] {
            fs::write(&path, &whole[..length]).expect("written");
            bench.refuses(&with_model(&bench), 4, &[name]);
        }
    }
}

#[test]
fn flipped_header_bytes_are_noticed() {
    let bench = Bench::new();
    let path = bench.copy_model("sd3").join(TRANSFORMER);
    let whole = fs::read(&path).expect("weights");
    let header = header_length(&whole);
    let text = std::str::from_utf8(&whole[8..header]).expect("JSON");
    // Nothing depends on the file's own remarks or on the padding after the JSON.
    let end = 8 + text.trim_end().len();
    let remarks = match text.find("\"__metadata__\"") {
        Some(start) => 8 + start..8 + start + text[start..].find('}').expect("its end") + 1,
        None => 0..0,
    };
    let body = (8..end).step_by(end / 40).filter(|at| !remarks.contains(at));
    for at in (0..8).chain(body) {
        let mut flipped = whole.clone();
        flipped[at] ^= if at < 8 { 0x80 } else { 0x05 };
        fs::write(&path, &flipped).expect("written");
        bench.refuses(&with_model(&bench), 4, &[TRANSFORMER]);
    }
}

#[test]
fn a_header_without_limits_takes_no_memory() {
    let bench = Bench::new();
    let path = bench.copy_model("sd3").join(TRANSFORMER);
    let whole = fs::read(&path).expect("weights");
    for length in [0, 7, 1 << 27, u64::MAX / 2, u64::MAX] {
        let file = [&length.to_le_bytes(), &whole[8..]].concat();
        fs::write(&path, file).expect("written");
        bench.refuses(&with_model(&bench), 4, &[TRANSFORMER]);
    }
    let deep = "[".repeat(100_000);
    let overflow =
        r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,16],"data_offsets":[0,0]}}"#;
    let reversed = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#;
    let negative = r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#;
    for header in [deep.as_str(), overflow, reversed, negative, "\u{ff}", "null"] {
        let length = (header.len() as u64).to_le_bytes();
        fs::write(&path, [&length, header.as_bytes(), &[0; 64]].concat()).expect("written");
        bench.refuses(&with_model(&bench), 4, &[TRANSFORMER]);
    }
}

#[test]
fn weights_of_another_model_are_noticed() {
    let bench = Bench::new();
    // The other family's transformer, without and with its configuration.
    let model = bench.copy_model("sd3");
    fs::copy(golden("flux").join(TRANSFORMER), model.join(TRANSFORMER)).expect("a copy");
    let config = "diffusion_transformer_768p/config.json";
    bench.refuses(&with_model(&bench), 4, &[config, "says sd3", "are miniflux"]);
    fs::copy(golden("flux").join(config), model.join(config)).expect("a copy");
    bench.refuses(&with_model(&bench), 4, &["text_encoder_2/config.json"]);

    // Wrong shapes, too many and too few layers: all listed.
    let model = bench.copy_model("sd3");
    edit(&model.join("text_encoder/config.json"), |c| c["intermediate_size"] = 128.into());
    bench.refuses(
        &with_model(&bench),
        4,
        &["CLIP-L", "of another shape", "layers.0.mlp.fc1.weight is", "layers.1.mlp.fc2.weight is"],
    );
    for (layers, wrong) in [(3, "missing from"), (1, "not expected")] {
        let model = bench.copy_model("sd3");
        edit(&model.join(config), |c| c["num_layers"] = layers.into());
        bench.refuses(&with_model(&bench), 4, &[TRANSFORMER, wrong, "\n  transformer_blocks.1."]);
    }
}

#[test]
fn a_pickle_may_import_nothing_foreign() {
    let bench = Bench::new();
    let path = bench.copy_model("flux").join("causal_video_vae/diffusion_pytorch_model.bin");
    let mut file = fs::read(&path).expect("weights");
    let (start, old) = {
        let mut archive = zip::ZipArchive::new(std::io::Cursor::new(&file)).expect("a zip");
        let names: Vec<_> = archive.file_names().flatten().map(|n| n.into_owned()).collect();
        let name = names.iter().find(|n| n.ends_with("data.pkl")).expect("a pickle");
        let mut entry = archive.by_name(name).expect("a pickle");
        let mut pickle = Vec::new();
        entry.read_to_end(&mut pickle).expect("stored");
        (entry.data_start().expect("stored") as usize, pickle)
    };
    // The same length, so that only the checksums have to follow.
    let (from, to) =
        (b"ctorch._utils\n_rebuild_tensor_v2\n", b"cposix.system\n_rebuild_tensor_v2\n");
    let at = old.windows(from.len()).position(|w| w == from).expect("the usual import");
    let mut pickle = old.clone();
    pickle[at..at + to.len()].copy_from_slice(to);
    file[start..start + pickle.len()].copy_from_slice(&pickle);
    let [before, after] = [&old, &pickle].map(|p| crc32fast::hash(p).to_le_bytes());
    let places: Vec<usize> = (0..file.len() - 3).filter(|&i| file[i..i + 4] == before).collect();
    assert!(!places.is_empty(), "the checksum is in the directory");
    for place in places {
        file[place..place + 4].copy_from_slice(&after);
    }
    fs::write(&path, file).expect("written");
    let name = "causal_video_vae/diffusion_pytorch_model.bin";
    bench.refuses(&with_model(&bench), 4, &[name, "posix.system"]);
}

#[test]
fn poisoned_weights_end_in_an_error_and_no_video() {
    let bench = Bench::new();
    let path = bench.copy_model("sd3").join(TRANSFORMER);
    let mut file = fs::read(&path).expect("weights");
    let header = header_length(&file);
    let nan = half::bf16::NAN.to_le_bytes();
    for value in file[header..].chunks_exact_mut(2).step_by(1000) {
        value.copy_from_slice(&nan);
    }
    fs::write(&path, file).expect("written");
    bench.generate(&with_model(&bench)).fails(9, &["unit 0", "NaN", "hint: check the checkpoint"]);
    assert!(!bench.path("out.mp4").exists());
}

#[test]
fn a_changed_source_is_converted_again() {
    let bench = Bench::new();
    let model = bench.copy_model("sd3");
    bench.generate(&with_model(&bench).set("-o", "a.y4m")).ok();
    let path = model.join("text_encoder_3/model-00001-of-00002.safetensors");
    let mut file = fs::read(&path).expect("weights");
    let header = header_length(&file);
    for value in file[header..].chunks_exact_mut(2) {
        value.reverse();
        value[1] &= 0x3f;
    }
    fs::write(&path, file).expect("written");
    bench.generate(&with_model(&bench).set("-o", "b.y4m")).ok();
    assert!(bench.read("a.y4m") != bench.read("b.y4m"));
}
