//! The CLIP text encoders (Radford et al., arXiv 2103.00020): causal pre-norm blocks. Only
//! the pooled state is used, so nothing after the pooled token is computed.

use super::{ExpectedWeight, Record, collect_weights};
use crate::Result;
use crate::checkpoint::{ClipActivation, ClipConfig};
use crate::graph::{Activation, AttentionSpec, Epilogue, Graph, Op, Segment, TensorId};
use crate::tensor::DType;

/// Records the encoding of the ids up to and including the pooled token: input `ids`,
/// output `pooled` `[1, projection or width]`.
///
/// # Errors
/// [`crate::ErrorKind::Model`] when shapes do not fit.
pub fn record(config: &ClipConfig, tokens: usize, dtype: DType) -> Result<Graph> {
    let mut g = Graph::new();
    let d = config.width;
    g.scope("text_model.embeddings");
    let ids = g.input("ids", &[tokens], DType::U32);
    let name = "text_model.embeddings";
    let table = g.weight(&format!("{name}.token_embedding.weight"), &[config.vocab_size, d]);
    let shape = [config.max_positions, d];
    let positions = Some(g.weight(&format!("{name}.position_embedding.weight"), &shape));
    let x = g.push_as(Op::Embedding { table, positions }, &[ids], dtype)?;
    for i in 0..config.layers {
        let name = format!("text_model.encoder.layers.{i}");
        let first = g.open_block(&name);
        block(&mut g, config, &name, x)?;
        g.close_block(&name, first);
    }
    g.scope("text_model.final_layer_norm");
    let last = g.rows(x, tokens - 1..tokens);
    let mut pooled = layer_norm(&mut g, config, "text_model.final_layer_norm", last)?;
    if let Some(projection) = config.projection {
        g.scope("text_projection");
        let parts = vec![(g.weight("text_projection.weight", &[projection, d]), None)];
        pooled = g.push(Op::Linear { parts, epilogue: Epilogue::Store }, &[pooled])?;
    }
    g.mark_output("pooled", pooled);
    Ok(g)
}

/// Number of ids up to and including the pooled token: the first with the largest id.
pub fn pooled_length(ids: &[u32]) -> usize {
    let largest = ids.iter().max();
    ids.iter().position(|id| Some(id) == largest).map_or(0, |i| i + 1)
}

/// Every weight of the component.
///
/// # Errors
/// [`crate::ErrorKind::Model`] when the configuration contradicts itself.
pub fn expected_weights(config: &ClipConfig) -> Result<Vec<ExpectedWeight>> {
    Ok(collect_weights(&[record(config, 1, DType::F32)?]))
}

fn layer_norm(g: &mut Graph, config: &ClipConfig, name: &str, x: TensorId) -> Result<TensorId> {
    let weight = g.weight(&format!("{name}.weight"), &[config.width]);
    let bias = g.weight(&format!("{name}.bias"), &[config.width]);
    g.push(Op::LayerNorm { weight, bias, eps: config.norm_eps }, &[x])
}

fn block(g: &mut Graph, config: &ClipConfig, name: &str, x: TensorId) -> Result<()> {
    let (d, tokens) = (config.width, g.tensor(x).rows());
    let n = layer_norm(g, config, &format!("{name}.layer_norm1"), x)?;
    let parts = ["q_proj", "k_proj", "v_proj"]
        .map(|p| g.linear_weights(&format!("{name}.self_attn.{p}"), d, d))
        .to_vec();
    let qkv = g.push(Op::Linear { parts, epilogue: Epilogue::Store }, &[n])?;
    let [q, k, v] = [0, 1, 2].map(|i| g.cols(qkv, i * d..(i + 1) * d));
    let spec = AttentionSpec {
        heads: config.heads,
        scale: 1.0 / ((d / config.heads) as f32).sqrt(),
        segments: [Segment { queries: 0..tokens, keys: std::iter::once(0..tokens).collect() }]
            .into(),
        causal: true,
        relative_bias: None,
    };
    let attended = g.push(Op::Attention(spec), &[q, k, v])?;
    let parts = vec![g.linear_weights(&format!("{name}.self_attn.out_proj"), d, d)];
    g.push_into(Op::Linear { parts, epilogue: Epilogue::Accumulate }, &[attended], x)?;

    let n = layer_norm(g, config, &format!("{name}.layer_norm2"), x)?;
    let activation = match config.activation {
        ClipActivation::QuickGelu => Activation::QuickGelu,
        ClipActivation::Gelu => Activation::GeluErf,
    };
    let act = Epilogue::Activate(activation);
    let hidden = g.linear(&format!("{name}.mlp.fc1"), n, config.ffn_width, act)?;
    let parts = vec![g.linear_weights(&format!("{name}.mlp.fc2"), d, config.ffn_width)];
    g.push_into(Op::Linear { parts, epilogue: Epilogue::Accumulate }, &[hidden], x)
}
