//! The golden checkpoints load, and what does not fit together is refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use pyraflow::ErrorKind;
use pyraflow::checkpoint::{Checkpoint, Component, Family, Summary, TransformerConfig, Variant};
use pyraflow::tensor::{DType, WeightSource};
use serde_json::{Value, json};

use super::{components, copy_of, golden, goldens};

#[test]
fn goldens_open_with_all_their_components() {
    for dir in goldens() {
        let checkpoint = Checkpoint::open(&dir, None).unwrap();
        assert_eq!(checkpoint.missing(), [""; 0], "{}", dir.display());
        checkpoint.require_complete().unwrap();
        for component in components(&checkpoint) {
            let weights = checkpoint.source_weights(component).unwrap();
            assert!(!weights.is_empty());
            for (name, view) in weights.iter() {
                assert_eq!(view.bytes.len(), view.len() * view.dtype.bytes(), "{name}");
                assert!(view.to_f32().iter().all(|x| x.is_finite()), "{name}");
            }
        }
    }
}

#[test]
fn configurations_agree_with_the_weights() {
    for dir in goldens() {
        let checkpoint = Checkpoint::open(&dir, None).unwrap();
        let shape = |component, name: &str| {
            let weights = checkpoint.source_weights(component).unwrap();
            weights.weight(name).unwrap().shape.to_vec()
        };
        let config = checkpoint.transformer();
        let text = shape(Component::Transformer, "context_embedder.weight");
        assert_eq!(text, [config.width(), config.text_dim()]);
        let vae = checkpoint.vae().unwrap();
        let conv_in = shape(Component::Vae, "decoder.conv_in.conv.weight");
        assert_eq!(conv_in[..2], [vae.decoder_channels[3], vae.latent_channels]);
        let t5 = checkpoint.t5().unwrap();
        assert_eq!(shape(Component::T5, "shared.weight"), [t5.vocab_size, t5.width]);
        let clip = checkpoint.clip_l().unwrap();
        let position = shape(Component::ClipL, "text_model.embeddings.position_embedding.weight");
        assert_eq!(position, [clip.max_positions, clip.width]);
        match config {
            TransformerConfig::Mmdit(mmdit) => {
                assert_eq!(checkpoint.family(), Family::Sd3);
                let side = mmdit.pos_embed_max_size;
                let table = shape(Component::Transformer, "pos_embed.pos_embed");
                assert_eq!(table, [1, side * side, mmdit.width()]);
                let pooled =
                    clip.projection.unwrap() + checkpoint.clip_g().unwrap().projection.unwrap();
                assert_eq!(mmdit.pooled_dim, pooled);
            }
            TransformerConfig::Flux(flux) => {
                assert_eq!(checkpoint.family(), Family::Miniflux);
                assert_eq!(clip.projection, None);
                assert_eq!(checkpoint.clip_g().unwrap_err().kind(), ErrorKind::Model);
                let token = shape(Component::Transformer, "x_embedder.weight");
                assert_eq!(token, [flux.width(), flux.in_channels]);
            }
        }
    }
}

/// miniflux's VAE is a pickle, sd3's a safetensors file of the same architecture.
#[test]
fn the_pickled_vae_has_the_tensors_of_the_other() {
    let shapes = |family| -> BTreeMap<String, (DType, Vec<usize>)> {
        let checkpoint = Checkpoint::open(&golden(family), None).unwrap();
        let weights = checkpoint.source_weights(Component::Vae).unwrap();
        weights.iter().map(|(n, v)| (n.to_owned(), (v.dtype, v.shape.to_vec()))).collect()
    };
    let vae = |family| Checkpoint::open(&golden(family), None).unwrap().vae().unwrap().clone();
    assert_eq!(vae("flux"), vae("sd3"));
    let (pickled, plain) = (shapes("flux"), shapes("sd3"));
    assert!(pickled.values().all(|(dtype, _)| *dtype == DType::F32));
    let only_shapes = |map: BTreeMap<String, (DType, Vec<usize>)>| -> Vec<_> {
        map.into_iter().map(|(name, (_, shape))| (name, shape)).collect()
    };
    assert_eq!(only_shapes(pickled), only_shapes(plain));
}

/// A layer of T5 has tensors in both shards: the index decides for each tensor.
#[test]
fn shards_are_resolved_tensor_by_tensor() {
    for dir in goldens() {
        let weights = Checkpoint::open(&dir, None).unwrap().source_weights(Component::T5).unwrap();
        assert_eq!(weights.paths().count(), 2);
        weights.weight("encoder.block.1.layer.0.SelfAttention.v.weight").unwrap();
        weights.weight("encoder.block.1.layer.0.SelfAttention.o.weight").unwrap();
        let error = weights.weight("encoder.embed_tokens.weight").unwrap_err();
        assert!(error.to_string().contains("T5"), "{error}");
    }
}

#[test]
fn tokenizers_are_found_through_links_written_as_text() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("flux");
    fs::create_dir(&copy).unwrap();
    let transformer = "diffusion_transformer_768p";
    fs::create_dir(copy.join(transformer)).unwrap();
    let config = golden("flux").join(transformer).join("config.json");
    fs::copy(config, copy.join(transformer).join("config.json")).unwrap();
    let real = dir.path().join("sd3/tokenizer");
    fs::create_dir_all(&real).unwrap();
    fs::write(real.join("vocab.json"), "{}").unwrap();
    fs::write(copy.join("tokenizer"), "../sd3/tokenizer\n").unwrap();

    let checkpoint = Checkpoint::open(&copy, None).unwrap();
    let error = checkpoint.tokenizer_dir(Component::ClipL).unwrap_err();
    assert!(error.to_string().contains("merges.txt"), "{error}");
    fs::write(real.join("merges.txt"), "").unwrap();
    let found = checkpoint.tokenizer_dir(Component::ClipL).unwrap();
    assert_eq!(found.canonicalize().unwrap(), real.canonicalize().unwrap());
    assert_eq!(checkpoint.tokenizer_dir(Component::Vae).unwrap_err().kind(), ErrorKind::Model);
}

#[test]
fn variants_are_listed_and_chosen() {
    let copy = copy_of("sd3");
    let dir = copy.path();
    assert_eq!(Variant::available(dir), [Variant::P768]);
    assert_eq!(Checkpoint::open(dir, None).unwrap().variant(), Variant::P768);
    let error = Checkpoint::open(dir, Some("384p")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Model);
    assert!(error.to_string().contains("768p"), "{error}");
    assert_eq!(Checkpoint::open(dir, Some("1080p")).unwrap_err().kind(), ErrorKind::Usage);

    fs::create_dir(dir.join("diffusion_transformer_384p")).unwrap();
    for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
        let from = dir.join("diffusion_transformer_768p").join(file);
        fs::copy(from, dir.join("diffusion_transformer_384p").join(file)).unwrap();
    }
    let error = Checkpoint::open(dir, None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    assert!(error.to_string().contains("384p, 768p"), "{error}");
    assert_eq!(Checkpoint::open(dir, Some("384p")).unwrap().variant(), Variant::P384);

    assert!(Variant::P384.fits(640, 384, 16) && Variant::P384.fits(384, 640, 1));
    assert!(!Variant::P384.fits(640, 384, 17) && !Variant::P384.fits(1280, 768, 1));
    assert!(Variant::P768.fits(1280, 768, 31) && !Variant::Image.fits(1024, 1024, 2));
}

#[test]
fn what_is_no_checkpoint_is_said_to_be_none() {
    let empty = tempfile::tempdir().unwrap();
    for dir in [empty.path(), &empty.path().join("absent")] {
        assert_eq!(Checkpoint::open(dir, None).unwrap_err().kind(), ErrorKind::Model);
    }
    let part = golden("sd3").join("causal_video_vae");
    let error = Checkpoint::open(&part, None).unwrap_err();
    assert!(error.hint_text().unwrap().contains("folder above"), "{error}");
}

#[test]
fn files_of_two_families_do_not_mix() {
    let copy = copy_of("sd3");
    let transformer = "diffusion_transformer_768p/diffusion_pytorch_model.safetensors";
    fs::copy(golden("flux").join(transformer), copy.path().join(transformer)).unwrap();
    let error = Checkpoint::open(copy.path(), None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Model);
    assert!(error.to_string().contains("miniflux"), "{error}");

    // A transformer that expects another pooled width than the encoders give.
    let copy = copy_of("flux");
    edit_config(copy.path(), "diffusion_transformer_768p", "pooled_projection_dim", json!(33));
    let error = Checkpoint::open(copy.path(), None).unwrap_err();
    assert!(error.to_string().contains("pooled"), "{error}");
}

#[test]
fn verify_lists_every_difference_at_once() {
    let dir = golden("sd3");
    let weights =
        Checkpoint::open(&dir, None).unwrap().source_weights(Component::Transformer).unwrap();
    let mut expected: Vec<_> =
        weights.iter().map(|(name, view)| (name.to_owned(), view.shape.to_vec())).collect();
    weights.verify(&expected).unwrap();

    expected.retain(|(name, _)| name != "proj_out.bias" && name != "proj_out.weight");
    expected[0].1 = vec![3, 5];
    expected.push(("absent.one".into(), vec![7]));
    expected.push(("absent.two".into(), vec![8]));
    let error = weights.verify(&expected).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Model);
    let text = error.to_string();
    for part in ["2 missing", "absent.one [7]", "absent.two [8]", "2 not expected", "proj_out.bias"]
    {
        assert!(text.contains(part), "{part:?} in {text}");
    }
    let actual = weights.weight(&expected[0].0).unwrap().shape;
    assert!(text.contains(&format!("{} is {actual:?} in ", expected[0].0)), "{text}");
    assert!(text.contains("expected [3, 5]") && text.contains(".safetensors"), "{text}");
    assert_eq!(error.hint_text(), None);

    // The other family's names: a long list is cut, and the mistake is named.
    let flux = Checkpoint::open(&golden("flux"), None).unwrap();
    let flux = flux.source_weights(Component::Transformer).unwrap();
    let expected: Vec<_> =
        flux.iter().map(|(name, view)| (name.to_owned(), view.shape.to_vec())).collect();
    let error = weights.verify(&expected).unwrap_err();
    assert!(error.hint_text().unwrap().contains("sd3 weights where miniflux"), "{error}");
    assert!(error.to_string().contains("more"), "{error}");
    assert!(error.to_string().lines().count() < 100);
}

#[test]
fn summaries_need_no_complete_checkpoint() {
    for dir in goldens() {
        let checkpoint = Checkpoint::open(&dir, None).unwrap();
        let summary = checkpoint.summary();
        assert_eq!(summary.family, Some(checkpoint.family()));
        assert_eq!(summary.missing, [""; 0]);
        for part in &summary.components {
            assert_eq!(part.problem, None);
            let weights = checkpoint.source_weights(part.component).unwrap();
            assert_eq!(part.tensors, weights.len());
            assert_eq!(part.bytes, weights.total_bytes());
            assert!(!part.files.is_empty() && part.parameters > 0);
        }
        let json = serde_json::to_value(&summary).unwrap();
        assert_eq!(json["components"][0]["component"], "transformer");
        assert!(json["components"][0]["blocks"]["transformer_blocks"].as_u64() > Some(0));
    }

    let copy = copy_of("sd3");
    let dir = copy.path();
    fs::remove_dir_all(dir.join("text_encoder_2")).unwrap();
    fs::remove_file(dir.join("text_encoder_3/model-00002-of-00002.safetensors")).unwrap();
    fs::write(dir.join("causal_video_vae/diffusion_pytorch_model.safetensors"), "junk").unwrap();
    let summary = Summary::read(dir);
    for path in [
        "text_encoder_2/config.json",
        "text_encoder_2/model.safetensors",
        "text_encoder_3/model-00002-of-00002.safetensors",
        "tokenizer/vocab.json",
    ] {
        assert!(summary.missing.iter().any(|m| m == path), "{path} in {:?}", summary.missing);
    }
    let broken: Vec<_> =
        summary.components.iter().filter(|c| c.problem.is_some()).map(|c| c.component).collect();
    assert_eq!(broken, [Component::Vae, Component::ClipG, Component::T5]);
    let checkpoint = Checkpoint::open(dir, None).unwrap();
    let error = checkpoint.require_complete().unwrap_err();
    assert!(error.to_string().contains("model-00002-of-00002"), "{error}");
    assert!(checkpoint.clip_g().is_err() && checkpoint.t5().is_ok());

    let nothing = tempfile::tempdir().unwrap();
    let summary = Summary::read(nothing.path());
    assert!(summary.family.is_none() && !summary.missing.is_empty());
}

fn edit_config(dir: &Path, folder: &str, key: &str, value: Value) {
    let path = dir.join(folder).join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    match value {
        Value::Null => drop(config.as_object_mut().unwrap().remove(key)),
        value => config[key] = value,
    }
    fs::write(path, config.to_string()).unwrap();
}

/// Every setting that is not implemented, absurd or missing is refused by name.
#[test]
fn settings_out_of_range_are_refused_by_name() {
    let transformer = "diffusion_transformer_768p";
    let huge = json!(1u64 << 40);
    let cases = [
        ("sd3", transformer, "_class_name", json!("UNet")),
        ("sd3", transformer, "attention_head_dim", json!(128)),
        ("sd3", transformer, "num_layers", json!(0)),
        ("sd3", transformer, "num_layers", json!(-1)),
        ("sd3", transformer, "num_layers", json!(2.5)),
        ("sd3", transformer, "num_layers", Value::Null),
        ("sd3", transformer, "num_attention_heads", huge.clone()),
        ("sd3", transformer, "caption_projection_dim", json!(127)),
        ("sd3", transformer, "patch_size", json!(4)),
        ("sd3", transformer, "qk_norm", json!("layer_norm")),
        ("sd3", transformer, "pos_embed_type", json!("rope")),
        ("sd3", transformer, "use_temporal_causal", json!(false)),
        ("sd3", transformer, "add_temp_pos_embed", json!(false)),
        ("sd3", transformer, "temp_pos_embed_type", json!("sincos")),
        ("sd3", transformer, "use_t5_mask", json!(false)),
        ("sd3", transformer, "interp_condition_pos", json!(false)),
        ("sd3", transformer, "pos_embed_max_size", json!("24")),
        ("flux", transformer, "axes_dims_rope", json!([16, 24])),
        ("flux", transformer, "axes_dims_rope", json!([15, 25, 24])),
        ("flux", transformer, "axes_dims_rope", json!([16, 24, 26])),
        ("flux", transformer, "interp_condition_pos", json!(false)),
        ("flux", transformer, "num_single_layers", json!(u64::MAX)),
        ("flux", transformer, "in_channels", json!(16)),
        ("sd3", "causal_video_vae", "decoder_act_fn", json!("relu")),
        ("sd3", "causal_video_vae", "encoder_norm_num_groups", json!(5)),
        ("sd3", "causal_video_vae", "decoder_block_out_channels", json!([16, 16, 16])),
        (
            "sd3",
            "causal_video_vae",
            "decoder_temporal_up_sample",
            json!([true, true, false, false]),
        ),
        ("sd3", "causal_video_vae", "encoder_layers_per_block", json!([0, 1, 1, 1])),
        ("sd3", "causal_video_vae", "interpolate", json!(true)),
        ("sd3", "text_encoder", "hidden_act", json!("relu")),
        ("sd3", "text_encoder", "num_attention_heads", json!(5)),
        ("sd3", "text_encoder_2", "eos_token_id", json!(3)),
        ("sd3", "text_encoder_2", "layer_norm_eps", json!(0)),
        ("sd3", "text_encoder_3", "feed_forward_proj", json!("relu")),
        ("sd3", "text_encoder_3", "relative_attention_num_buckets", json!(0)),
        ("sd3", "text_encoder_3", "relative_attention_max_distance", json!(8)),
        ("sd3", "text_encoder_3", "vocab_size", huge),
    ];
    for (family, folder, key, value) in cases {
        let copy = copy_of(family);
        edit_config(copy.path(), folder, key, value.clone());
        let error = Checkpoint::open(copy.path(), None).expect_err(&format!("{key} = {value}"));
        assert_eq!(error.kind(), ErrorKind::Model);
        // Divisibility is reported at the value that must be divisible.
        let text = error.to_string();
        let named = match key {
            "encoder_norm_num_groups" => "encoder_block_out_channels",
            "num_attention_heads" if folder == "text_encoder" => "hidden_size",
            _ => key,
        };
        assert!(text.contains(named) && text.contains("config.json"), "{key}: {text}");
    }
    for junk in ["", "[]", "{", "\u{feff}{}", &"[".repeat(100_000)] {
        let copy = copy_of("sd3");
        fs::write(copy.path().join("causal_video_vae/config.json"), junk).unwrap();
        assert_eq!(Checkpoint::open(copy.path(), None).unwrap_err().kind(), ErrorKind::Model);
    }
}

/// The settings of the published files, beside which the goldens are small.
#[test]
fn published_configurations_are_accepted() {
    let copy = copy_of("sd3");
    let dir = copy.path();
    for folder in fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
        for file in fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
            if file.extension().is_some_and(|e| e == "safetensors") {
                fs::remove_file(file).unwrap();
            }
        }
    }
    let edits: [(&str, Value); 5] = [
        (
            "diffusion_transformer_768p",
            json!({"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
                "pooled_projection_dim": 2048, "joint_attention_dim": 4096,
                "pos_embed_max_size": 192, "max_num_frames": 200, "sample_size": 128,
                "use_gradient_checkpointing": false}),
        ),
        (
            "causal_video_vae",
            json!({"encoder_block_out_channels": [128, 256, 512, 512],
                "decoder_block_out_channels": [128, 256, 512, 512],
                "encoder_layers_per_block": [2, 2, 2, 2], "decoder_layers_per_block": [3, 3, 3, 3],
                "encoder_norm_num_groups": 32, "decoder_norm_num_groups": 32}),
        ),
        (
            "text_encoder",
            json!({"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                "intermediate_size": 3072, "vocab_size": 49408, "projection_dim": 768}),
        ),
        (
            "text_encoder_2",
            json!({"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20,
                "intermediate_size": 5120, "vocab_size": 49408, "projection_dim": 1280}),
        ),
        (
            "text_encoder_3",
            json!({"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24,
                "vocab_size": 32128, "dense_act_fn": "gelu_new", "is_gated_act": true}),
        ),
    ];
    for (folder, values) in edits {
        for (key, value) in values.as_object().unwrap() {
            edit_config(dir, folder, key, value.clone());
        }
    }
    let checkpoint = Checkpoint::open(dir, None).unwrap();
    assert_eq!(checkpoint.transformer().width(), 1536);
    assert_eq!(checkpoint.missing().iter().filter(|m| m.ends_with(".safetensors")).count(), 6);
}
