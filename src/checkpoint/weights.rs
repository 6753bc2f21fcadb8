//! The weights of one opened component.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use super::Family;
use super::formats::{Found, Shard, WeightFiles};
use super::mapped::MappedFile;
use super::shorten;
use crate::tensor::{DType, WeightSource, WeightView};
use crate::{Error, Result};

/// The weights of one component, mapped from its files.
///
/// Tensors are used where they lie; only strided tensors of a `.bin` file are copied into
/// row-major order when it is opened. How files may change below a map, and what happens
/// then, is stated at [`ComponentWeights::check_unchanged`].
#[derive(Debug)]
pub struct ComponentWeights {
    label: String,
    files: Vec<MappedFile>,
    tensors: BTreeMap<String, Tensor>,
}

#[derive(Debug)]
struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    /// Index into the files.
    file: usize,
    data: Data,
}

#[derive(Debug)]
enum Data {
    Mapped(Range<usize>),
    Copied(Box<[u8]>),
}

impl ComponentWeights {
    /// Opens files in whatever form they are published. `label` names them in messages.
    pub(super) fn open(label: impl Into<String>, files: &WeightFiles) -> Result<Self> {
        Self::from_shards(label, files.open()?)
    }

    pub(super) fn from_shards(label: impl Into<String>, shards: Vec<Shard>) -> Result<Self> {
        let mut weights =
            ComponentWeights { label: label.into(), files: Vec::new(), tensors: BTreeMap::new() };
        for (index, Shard { file, tensors }) in shards.into_iter().enumerate() {
            // What is copied out of a file can share its records, but honest files do not:
            // this keeps the copies within the file's size.
            let mut copied = 0usize;
            for found in tensors {
                let data = match &found.strides {
                    None => Data::Mapped(found.bytes.clone()),
                    Some(strides) => {
                        copied = copied.saturating_add(byte_len(&found));
                        if copied > file.bytes().len() {
                            return Err(Error::model(format!(
                                "{}: its strided tensors are larger than the file",
                                file.path().display()
                            )));
                        }
                        Data::Copied(gather(&file.bytes()[found.bytes.clone()], &found, strides))
                    }
                };
                let Found { name, dtype, shape, .. } = found;
                let tensor = Tensor { dtype, shape, file: index, data };
                if weights.tensors.insert(name.clone(), tensor).is_some() {
                    return Err(Error::model(format!(
                        "{}: {name:?} is there twice",
                        file.path().display()
                    )));
                }
            }
            weights.files.push(file);
        }
        Ok(weights)
    }

    /// What these weights are called in messages, such as `transformer (384p)`.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The files that the weights are mapped from.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(MappedFile::path)
    }

    pub(super) fn files(&self) -> &[MappedFile] {
        &self.files
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// All tensors, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, WeightView<'_>)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), self.view(tensor)))
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there is no tensor at all.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Total size of the tensors in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.iter().map(|(_, view)| view.bytes.len() as u64).sum()
    }

    fn view<'a>(&'a self, tensor: &'a Tensor) -> WeightView<'a> {
        let bytes = match &tensor.data {
            Data::Mapped(range) => &self.files[tensor.file].bytes()[range.clone()],
            Data::Copied(bytes) => bytes,
        };
        WeightView { dtype: tensor.dtype, shape: &tensor.shape, bytes }
    }

    /// The mapped pages of a tensor are not needed for now.
    pub(super) fn release(&self, name: &str) {
        if let Some(Tensor { file, data: Data::Mapped(range), .. }) = self.tensors.get(name) {
            self.files[*file].release(range.clone());
        }
    }

    /// An error if a file's length or modification time is no longer what it was when it
    /// was opened.
    ///
    /// A file that is *truncated* while mapped kills the process (SIGBUS) at the next access
    /// to what is gone; no reader of mapped files can prevent that. Call this between the
    /// phases of a run to turn most such cases into a message.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] naming the first changed file.
    pub fn check_unchanged(&self) -> Result<()> {
        self.files.iter().try_for_each(MappedFile::check_unchanged)
    }

    /// Compares names and shapes with what a model expects and reports *all* differences in
    /// one error: tensors that are missing, not expected, or of another shape.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Model`] if there is any difference.
    pub fn verify(&self, expected: &[(String, Vec<usize>)]) -> Result<()> {
        let names: BTreeSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
        let mut missing = Vec::new();
        let mut reshaped = Vec::new();
        for (name, shape) in expected {
            match self.tensors.get(name) {
                None => missing.push(format!("{name} {shape:?}")),
                Some(tensor) if tensor.shape != *shape => reshaped.push(format!(
                    "{name} is {:?} in {}, expected {shape:?}",
                    tensor.shape,
                    self.files[tensor.file].path().display()
                )),
                Some(_) => {}
            }
        }
        let unexpected: Vec<_> = self
            .tensors
            .iter()
            .filter(|(name, _)| !names.contains(name.as_str()))
            .map(|(name, tensor)| {
                let path = self.files[tensor.file].path().display();
                format!("{name} {:?} in {path}", tensor.shape)
            })
            .collect();
        if missing.is_empty() && reshaped.is_empty() && unexpected.is_empty() {
            return Ok(());
        }
        let paths: Vec<_> = self.paths().map(|path| path.display().to_string()).collect();
        let mut message = format!("the {} weights do not fit the model", self.label);
        for (title, list) in [
            (format!("missing from {}", paths.join(", ")), missing),
            ("of another shape".to_owned(), reshaped),
            ("not expected".to_owned(), unexpected),
        ] {
            if !list.is_empty() {
                message += &format!("\n{} {title}:\n  {}", list.len(), shorten(&list, "\n  "));
            }
        }
        let error = Error::model(message);
        let looks_like = Family::of_tensor_names(self.names());
        match (looks_like, Family::of_tensor_names(names.iter().copied())) {
            (Some(found), Some(wanted)) if found != wanted => Err(error.hint(format!(
                "these are {found} weights where {wanted} weights belong: is it the right folder?"
            ))),
            _ => Err(error),
        }
    }
}

impl WeightSource for ComponentWeights {
    fn weight(&self, name: &str) -> Result<WeightView<'_>> {
        match self.tensors.get(name) {
            Some(tensor) => Ok(self.view(tensor)),
            None => Err(Error::model(format!("the {} weights lack {name:?}", self.label))),
        }
    }
}

/// Bytes of a tensor in row-major order; checked against the file when it was found.
fn byte_len(found: &Found) -> usize {
    found.shape.iter().product::<usize>() * found.dtype.bytes()
}

/// Copies a strided tensor into row-major order. `bytes` runs from its first to its last
/// element, so every index below lies within it.
fn gather(bytes: &[u8], found: &Found, strides: &[usize]) -> Box<[u8]> {
    let size = found.dtype.bytes();
    let mut out = Vec::with_capacity(byte_len(found));
    let mut index = vec![0usize; found.shape.len()];
    let mut element = 0usize;
    loop {
        out.extend_from_slice(&bytes[element * size..(element + 1) * size]);
        // Count up like an odometer, the last dimension fastest.
        let mut dim = found.shape.len();
        loop {
            if dim == 0 {
                return out.into_boxed_slice();
            }
            dim -= 1;
            index[dim] += 1;
            element += strides[dim];
            if index[dim] < found.shape[dim] {
                break;
            }
            element -= index[dim] * strides[dim];
            index[dim] = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gathering_transposes() {
        let found = Found {
            name: "t".into(),
            dtype: DType::F16,
            shape: vec![2, 1, 3],
            bytes: 0..0,
            strides: None,
        };
        // Storage [3][2] seen as its transpose [2][1][3].
        let bytes: Vec<u8> = (0..12).collect();
        let gathered = gather(&bytes, &found, &[1, 7, 2]);
        assert_eq!(*gathered, [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]);
    }
}
