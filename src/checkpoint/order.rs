//! The order of tensors in the bf16 store.
//!
//! Streaming copies a whole transformer block at once and a fused projection reads q, k and v
//! as one matrix. Both need no copying here if the file already has them side by side: blocks
//! in numeric order (`transformer_blocks.10` after `.9`), and within a block the weights of q,
//! k and v adjacent in this order, then their biases likewise. A Flux single block's
//! `proj_mlp` reads the same input as its q, k and v and follows them.

/// Sorts like the order above says.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct OrderKey<'a>(Vec<Segment<'a>>);

/// Part of a name between dots. Numbers sort as numbers and before names.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Segment<'a> {
    Number(u64),
    Name(&'a str),
}

impl<'a> OrderKey<'a> {
    pub fn of(name: &'a str) -> Self {
        let mut parts: Vec<&str> = name.split('.').collect();
        let attribute = parts.pop().unwrap_or_default();
        let mut rank = 0;
        if let Some((path, fused)) = parts.last().and_then(|module| fused(module)) {
            parts.pop();
            parts.extend(path);
            rank = fused;
        }
        parts.push(attribute);
        let segments = parts.into_iter().map(|part| match part.parse() {
            Ok(number) => Segment::Number(number),
            Err(_) => Segment::Name(part),
        });
        OrderKey(segments.chain([Segment::Number(rank)]).collect())
    }
}

/// The common path of projections that belong together and the place of this one in it.
fn fused(module: &str) -> Option<(&'static [&'static str], u64)> {
    Some(match module {
        "to_q" => (&["to_qkv"], 0),
        "to_k" => (&["to_qkv"], 1),
        "to_v" => (&["to_qkv"], 2),
        "proj_mlp" => (&["attn", "to_qkv"], 3),
        "add_q_proj" => (&["add_qkv_proj"], 0),
        "add_k_proj" => (&["add_qkv_proj"], 1),
        "add_v_proj" => (&["add_qkv_proj"], 2),
        "q_proj" => (&["qkv_proj"], 0),
        "k_proj" => (&["qkv_proj"], 1),
        "v_proj" => (&["qkv_proj"], 2),
        "q" => (&["qkv"], 0),
        "k" => (&["qkv"], 1),
        "v" => (&["qkv"], 2),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_numeric_and_projections_adjacent() {
        let sorted = [
            "proj_out.weight",
            "single_transformer_blocks.2.attn.norm_k.weight",
            "single_transformer_blocks.2.attn.to_q.bias",
            "single_transformer_blocks.2.attn.to_k.bias",
            "single_transformer_blocks.2.attn.to_v.bias",
            "single_transformer_blocks.2.proj_mlp.bias",
            "single_transformer_blocks.2.attn.to_q.weight",
            "single_transformer_blocks.2.attn.to_k.weight",
            "single_transformer_blocks.2.attn.to_v.weight",
            "single_transformer_blocks.2.proj_mlp.weight",
            "single_transformer_blocks.2.proj_out.weight",
            "single_transformer_blocks.10.attn.norm_k.weight",
            "transformer_blocks.9.attn.add_q_proj.weight",
            "transformer_blocks.9.attn.add_k_proj.weight",
            "transformer_blocks.9.attn.add_v_proj.weight",
            "transformer_blocks.9.norm1.linear.weight",
            "transformer_blocks.10.attn.to_out.0.weight",
        ];
        assert!(sorted.is_sorted_by_key(|name| OrderKey::of(name)));
        let t5 = ["a.0.q.weight", "a.0.k.weight", "a.0.v.weight", "a.0.wi_0.weight"];
        assert!(t5.is_sorted_by_key(|name| OrderKey::of(name)));
    }

    #[test]
    fn different_names_have_different_places() {
        // `to_qkv` itself is no published name; all that share a path differ in rank.
        let names = ["", ".", "q", "to_q.weight", "to_k.weight", "99999999999999999999.weight"];
        for (i, a) in names.iter().enumerate() {
            for b in &names[i + 1..] {
                assert_ne!(OrderKey::of(a), OrderKey::of(b), "{a:?} {b:?}");
            }
        }
    }
}
