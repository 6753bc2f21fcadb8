//! The T5 v1.1 encoder (Raffel et al., arXiv 1910.10683; gated GELU after arXiv
//! 2002.05202): pre-norm blocks without biases, relative positions shared by all blocks.

use std::sync::Arc;

use super::{ExpectedWeight, collect_weights};
use crate::Result;
use crate::checkpoint::T5Config;
use crate::graph::{AttentionSpec, Epilogue, Graph, Op, RelativeBias, Segment, TensorId};
use crate::tensor::DType;

/// Records the encoding of prompts of so many ids, padding left out, one after the other:
/// input `ids` `[tokens]`, output `embeds` `[tokens, width]`.
///
/// # Errors
/// [`crate::ErrorKind::Model`] when shapes do not fit.
pub fn record(config: &T5Config, lengths: &[usize], dtype: DType) -> Result<Graph> {
    let tokens = lengths.iter().sum();
    let mut start = 0;
    let segments: Arc<[Segment]> = lengths
        .iter()
        .map(|&length| {
            let prompt = start..start + length;
            start = prompt.end;
            Segment { queries: prompt.clone(), keys: vec![prompt] }
        })
        .collect();
    let mut g = Graph::new();
    g.scope("shared");
    let ids = g.input("ids", &[tokens], DType::U32);
    let table = g.weight("shared.weight", &[config.vocab_size, config.width]);
    let mut x = g.push_as(Op::Embedding { table, positions: None }, &[ids], dtype)?;
    for i in 0..config.layers {
        let name = format!("encoder.block.{i}");
        let first = g.open_block(&name);
        attention(&mut g, config, &format!("{name}.layer.0"), x, &segments)?;
        feed_forward(&mut g, config, &format!("{name}.layer.1"), x)?;
        g.close_block(&name, first);
    }
    g.scope("encoder.final_layer_norm");
    x = rms_norm(&mut g, config, "encoder.final_layer_norm", x)?;
    g.mark_output("embeds", x);
    Ok(g)
}

/// Every weight of the component.
///
/// # Errors
/// [`crate::ErrorKind::Model`] when the configuration contradicts itself.
pub fn expected_weights(config: &T5Config) -> Result<Vec<ExpectedWeight>> {
    Ok(collect_weights(&[record(config, &[1], DType::F32)?]))
}

fn rms_norm(g: &mut Graph, config: &T5Config, name: &str, x: TensorId) -> Result<TensorId> {
    let weight = g.weight(&format!("{name}.weight"), &[config.width]);
    g.push(Op::RmsNorm { weight, eps: config.norm_eps }, &[x])
}

/// Adds `x·Wᵀ` of the layer `name` to `y`.
fn add(g: &mut Graph, name: &str, x: TensorId, y: TensorId) -> Result<()> {
    let shape = [g.tensor(y).cols(), g.tensor(x).cols()];
    let parts = vec![(g.weight(&format!("{name}.weight"), &shape), None)];
    g.push_into(Op::Linear { parts, epilogue: Epilogue::Accumulate }, &[x], y)
}

fn project(g: &mut Graph, names: &[String], outputs: usize, x: TensorId) -> Result<TensorId> {
    let inputs = g.tensor(x).cols();
    let weight = |name: &String| (g.weight(&format!("{name}.weight"), &[outputs, inputs]), None);
    let parts = names.iter().map(weight).collect();
    g.push(Op::Linear { parts, epilogue: Epilogue::Store }, &[x])
}

fn attention(
    g: &mut Graph,
    config: &T5Config,
    name: &str,
    x: TensorId,
    segments: &Arc<[Segment]>,
) -> Result<()> {
    let inner = config.heads * config.head_dim;
    let n = rms_norm(g, config, &format!("{name}.layer_norm"), x)?;
    let qkv = ["q", "k", "v"].map(|p| format!("{name}.SelfAttention.{p}"));
    let qkv = project(g, &qkv, inner, n)?;
    let [q, k, v] = [0, 1, 2].map(|i| g.cols(qkv, i * inner..(i + 1) * inner));
    let table = g.weight(
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        &[config.buckets, config.heads],
    );
    let (buckets, max_distance) = (config.buckets, config.max_distance);
    let spec = AttentionSpec {
        heads: config.heads,
        scale: 1.0,
        segments: segments.clone(),
        causal: false,
        relative_bias: Some(RelativeBias { table, buckets, max_distance }),
    };
    let attended = g.push(Op::Attention(spec), &[q, k, v])?;
    add(g, &format!("{name}.SelfAttention.o"), attended, x)
}

fn feed_forward(g: &mut Graph, config: &T5Config, name: &str, x: TensorId) -> Result<()> {
    let n = rms_norm(g, config, &format!("{name}.layer_norm"), x)?;
    let gates = ["wi_0", "wi_1"].map(|p| format!("{name}.DenseReluDense.{p}"));
    let gates = project(g, &gates, config.ffn_width, n)?;
    let hidden = g.push(Op::GatedGelu, &[gates])?;
    add(g, &format!("{name}.DenseReluDense.wo"), hidden, x)
}
