//! What a checkpoint's folder holds, from configurations and headers alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::config::{Settings, TransformerConfig};
use super::formats::{Shard, WeightFiles};
use super::layout::resolve_folder;
use super::{Component, Family, Variant};
use crate::Result;

/// Contents of a checkpoint folder, complete or not.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// The folder.
    pub path: PathBuf,
    /// Which model it is; none if no transformer's configuration can be read.
    pub family: Option<Family>,
    /// The transformers there are.
    pub variants: Vec<Variant>,
    /// All parts that the family has, missing ones too; one transformer for each variant.
    pub components: Vec<ComponentSummary>,
    /// What is missing for text to video, as paths below the folder.
    pub missing: Vec<String>,
}

/// One part of a checkpoint.
#[derive(Debug, Clone, Serialize)]
pub struct ComponentSummary {
    /// Which part.
    pub component: Component,
    /// Its folder below the checkpoint's.
    pub folder: String,
    /// Weight files, an index included.
    pub files: Vec<FileSummary>,
    /// Number of tensors.
    pub tensors: usize,
    /// Number of values in them.
    pub parameters: u64,
    /// Size of the tensors in bytes.
    pub bytes: u64,
    /// Number of tensors of each element type.
    pub dtypes: BTreeMap<String, usize>,
    /// Number of repeated blocks by the name of their list, such as `transformer_blocks`.
    pub blocks: BTreeMap<String, usize>,
    /// Why the weights cannot be read, if they cannot.
    pub problem: Option<String>,
}

/// A file of a component.
#[derive(Debug, Clone, Serialize)]
pub struct FileSummary {
    /// Its name in the component's folder.
    pub name: String,
    /// Its length.
    pub bytes: u64,
}

impl Summary {
    /// Looks into `dir`. Damage is reported in the summary, never as an error.
    pub fn read(dir: &Path) -> Self {
        let variants = Variant::available(dir);
        let family = variants.iter().find_map(|&variant| family_of(dir, variant));
        let mut components = Vec::new();
        let mut missing = BTreeSet::new();
        if let Some(family) = family {
            for &component in family.components() {
                // Only the transformer's folder depends on the variant.
                let of = if component == Component::Transformer {
                    &variants[..]
                } else {
                    &variants[..1]
                };
                let folders = of.iter().filter_map(|&variant| component.folder(family, variant));
                components.extend(folders.map(|f| ComponentSummary::read(dir, component, f)));
            }
            missing.extend(variants.iter().flat_map(|&v| missing_parts(dir, family, v)));
        } else {
            missing.insert("the config.json of a diffusion transformer".to_owned());
        }
        let missing = missing.into_iter().collect();
        Summary { path: dir.to_path_buf(), family, variants, components, missing }
    }
}

impl ComponentSummary {
    fn read(dir: &Path, component: Component, folder: &str) -> Self {
        let mut summary = ComponentSummary {
            component,
            folder: folder.to_owned(),
            files: Vec::new(),
            tensors: 0,
            parameters: 0,
            bytes: 0,
            dtypes: BTreeMap::new(),
            blocks: BTreeMap::new(),
            problem: None,
        };
        match component.find_weights(dir, folder) {
            None => summary.problem = Some("there are no weights".to_owned()),
            Some(weights) => {
                let read = summary.add_files(&weights).and_then(|()| weights.open());
                match read {
                    Ok(shards) => summary.add_tensors(&shards),
                    Err(error) => summary.problem = Some(error.to_string()),
                }
            }
        }
        summary
    }

    fn add_files(&mut self, weights: &WeightFiles) -> Result<()> {
        let (present, _) = weights.files()?;
        self.files.extend(present.iter().map(|path| FileSummary {
            name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            bytes: fs::metadata(path).map_or(0, |metadata| metadata.len()),
        }));
        Ok(())
    }

    fn add_tensors(&mut self, shards: &[Shard]) {
        let mut blocks = BTreeSet::new();
        for tensor in shards.iter().flat_map(|shard| &shard.tensors) {
            let parameters = tensor.shape.iter().product::<usize>() as u64;
            self.tensors += 1;
            self.parameters += parameters;
            self.bytes += parameters * tensor.dtype.bytes() as u64;
            *self.dtypes.entry(tensor.dtype.to_string()).or_default() += 1;
            blocks.extend(block_of(&tensor.name));
        }
        for (list, _) in blocks {
            *self.blocks.entry(list.to_owned()).or_default() += 1;
        }
    }
}

/// The outermost repeated block that a tensor belongs to: the name of the list, its index.
fn block_of(name: &str) -> Option<(&str, u64)> {
    let mut at = 0;
    for part in name.split('.') {
        if let (Ok(index), true) = (part.parse(), at > 0) {
            return Some((&name[..at - 1], index));
        }
        at += part.len() + 1;
    }
    None
}

fn family_of(dir: &Path, variant: Variant) -> Option<Family> {
    let folder = Component::Transformer.folder(Family::Sd3, variant)?;
    let settings = Settings::read(&dir.join(folder).join("config.json")).ok()?;
    TransformerConfig::from_settings(&settings).ok().map(|config| config.family())
}

/// Files that text to video needs and that are not there, as paths below `dir`.
pub(crate) fn missing_parts(dir: &Path, family: Family, variant: Variant) -> Vec<String> {
    let mut missing = Vec::new();
    for &component in family.components() {
        if let Some(name) = component.folder(family, variant) {
            let folder = dir.join(name);
            if !folder.join("config.json").is_file() {
                missing.push(format!("{name}/config.json"));
            }
            match component.find_weights(dir, name).map(|weights| weights.files()) {
                None => missing.push(format!("{name}/{}.safetensors", component.stem())),
                // A damaged index is not a missing file; opening it says what is wrong.
                Some(Err(_)) => {}
                Some(Ok((_, absent))) => missing.extend(absent.iter().map(|path| {
                    format!("{name}/{}", path.file_name().unwrap_or_default().to_string_lossy())
                })),
            }
        }
        if let Some((name, files)) = component.tokenizer(family) {
            let folder = resolve_folder(dir.join(name));
            let absent = files.iter().filter(|file| !folder.join(file).is_file());
            missing.extend(absent.map(|file| format!("{name}/{file}")));
        }
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_found_in_names() {
        let cases = [
            ("transformer_blocks.12.attn.to_out.0.weight", Some(("transformer_blocks", 12))),
            ("encoder.block.3.layer.1.wo.weight", Some(("encoder.block", 3))),
            ("proj_out.weight", None),
            ("7.weight", None),
        ];
        for (name, block) in cases {
            assert_eq!(block_of(name), block);
        }
    }
}
