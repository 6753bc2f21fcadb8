//! The part of Python's pickle language that `torch.save` uses for a state dict.
//!
//! A pickle is a program for a small stack machine, and Python's own machine lets it import
//! and call anything. This one knows the opcodes of protocol 2 that a dictionary of tensors
//! needs and the six imports below; everything else is refused by name. Nothing is executed:
//! the result is a list of names with where each tensor lies in the archive.
//!
//! Values are small copies that point into the input or into flat arenas, so neither deep
//! nesting nor cycles can exhaust the stack, and memory is bounded by the pickle's length.
//!
//! Opcodes and semantics: CPython's `Lib/pickletools.py`; the arguments of the rebuild
//! functions: PyTorch's `torch/_utils.py`.

use std::collections::HashMap;

use crate::tensor::DType;
use crate::{Error, Result};

/// Longest pickle read. A checkpoint with 800 tensors needs about 150 KB.
pub(super) const MAX_PICKLE: usize = 4 << 20;
/// Deepest stack. `torch.save` pushes a few values per tensor before it collects them.
const MAX_STACK: usize = 1 << 17;
/// Most dimensions of a tensor.
const MAX_DIMS: usize = 8;

/// A tensor as the pickle describes it; nothing is checked against the data record yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PickledTensor<'a> {
    pub storage: Storage<'a>,
    /// Index of the first element in the storage.
    pub offset: usize,
    pub shape: Vec<usize>,
    /// Distance of neighbours along each dimension, in elements.
    pub strides: Vec<usize>,
}

/// A run of numbers in a record of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Storage<'a> {
    pub dtype: DType,
    /// The record's name below `data/`.
    pub key: &'a str,
    /// Number of elements.
    pub len: usize,
}

/// Everything a pickle may import.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Import {
    StorageType(DType),
    OrderedDict,
    RebuildTensor,
    RebuildFromType,
    RebuildParameter,
    TensorType,
}

impl Import {
    fn find(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("torch", "FloatStorage") => Import::StorageType(DType::F32),
            ("torch", "HalfStorage") => Import::StorageType(DType::F16),
            ("torch", "BFloat16Storage") => Import::StorageType(DType::Bf16),
            ("torch", "Tensor") => Import::TensorType,
            ("torch._utils", "_rebuild_tensor_v2") => Import::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Import::RebuildParameter,
            ("torch._tensor", "_rebuild_from_type_v2") => Import::RebuildFromType,
            ("collections", "OrderedDict") => Import::OrderedDict,
            _ => return None,
        })
    }
}

#[derive(Debug, Clone, Copy)]
enum Value<'a> {
    /// None, a boolean, a float or a list: allowed in ignored places only.
    Ignored,
    Int(i64),
    Text(&'a str),
    /// `len` values of the item arena from `start`.
    Tuple {
        start: usize,
        len: usize,
    },
    /// An index into the dictionaries.
    Dict(usize),
    Import(Import),
    Storage(Storage<'a>),
    /// An index into the tensors.
    Tensor(usize),
}

impl Value<'_> {
    fn kind(self) -> &'static str {
        match self {
            Value::Ignored => "a plain value",
            Value::Int(_) => "an integer",
            Value::Text(_) => "a string",
            Value::Tuple { .. } => "a tuple",
            Value::Dict(_) => "a dictionary",
            Value::Import(_) => "an import",
            Value::Storage(_) => "a storage",
            Value::Tensor(_) => "a tensor",
        }
    }
}

/// Reads a state dict: names and tensors in the order saved.
///
/// # Errors
/// [`crate::ErrorKind::Model`] for anything that is not a flat dictionary of tensors.
pub(super) fn read_state_dict(pickle: &[u8]) -> Result<Vec<(&str, PickledTensor<'_>)>> {
    if pickle.len() > MAX_PICKLE {
        return Err(Error::model(format!(
            "the pickle has {} bytes, more than the {MAX_PICKLE} a list of tensors can need",
            pickle.len()
        )));
    }
    let mut machine = Machine::new(pickle);
    let result = machine.run();
    let place = machine.at;
    result.map_err(|e| e.at(format_args!("pickle, byte {place}")))
}

struct Machine<'a> {
    input: &'a [u8],
    /// Position of the next byte to read.
    at: usize,
    stack: Vec<Value<'a>>,
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    items: Vec<Value<'a>>,
    dicts: Vec<Vec<(Value<'a>, Value<'a>)>>,
    tensors: Vec<PickledTensor<'a>>,
}

fn malformed(what: &str) -> Error {
    Error::model(format!("malformed: {what}"))
}

impl<'a> Machine<'a> {
    fn new(input: &'a [u8]) -> Self {
        Machine {
            input,
            at: 0,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            items: Vec::new(),
            dicts: Vec::new(),
            tensors: Vec::new(),
        }
    }

    fn run(&mut self) -> Result<Vec<(&'a str, PickledTensor<'a>)>> {
        loop {
            let opcode = self.byte()?;
            if opcode == b'.' {
                let top = self.pop()?;
                return self.finish(top);
            }
            self.step(opcode)?;
            if self.stack.len() + self.marks.len() > MAX_STACK {
                return Err(malformed("the stack grows too deep"));
            }
        }
    }

    fn step(&mut self, opcode: u8) -> Result<()> {
        match opcode {
            // PROTO
            0x80 => match self.byte()? {
                2 => Ok(()),
                version => Err(Error::model(format!("pickle protocol {version}, expected 2"))),
            },
            // MARK
            b'(' => {
                self.marks.push(self.stack.len());
                Ok(())
            }
            // NONE, NEWTRUE, NEWFALSE
            b'N' | 0x88 | 0x89 => self.push(Value::Ignored),
            // BINFLOAT
            b'G' => {
                self.take(8)?;
                self.push(Value::Ignored)
            }
            // BININT1, BININT2, BININT, LONG1
            b'K' => self.integer(1),
            b'M' => self.integer(2),
            b'J' => self.integer(4),
            0x8a => self.long(),
            // BINUNICODE
            b'X' => {
                let length = self.u32()? as usize;
                let text = std::str::from_utf8(self.take(length)?)
                    .map_err(|e| malformed("a string is not UTF-8").because(e))?;
                self.push(Value::Text(text))
            }
            // BINPUT, LONG_BINPUT, BINGET, LONG_BINGET
            b'q' => self.byte().and_then(|slot| self.remember(slot.into())),
            b'r' => self.u32().and_then(|slot| self.remember(slot)),
            b'h' => self.byte().and_then(|slot| self.recall(slot.into())),
            b'j' => self.u32().and_then(|slot| self.recall(slot)),
            // EMPTY_TUPLE, TUPLE1, TUPLE2, TUPLE3, TUPLE
            b')' => self.tuple(0),
            0x85 => self.tuple(1),
            0x86 => self.tuple(2),
            0x87 => self.tuple(3),
            b't' => self.pop_mark().and_then(|len| self.tuple(len)),
            // EMPTY_LIST, APPEND, APPENDS: lists occur in attributes that are ignored
            b']' => self.push(Value::Ignored),
            b'a' => self.append(1),
            b'e' => self.pop_mark().and_then(|len| self.append(len)),
            // EMPTY_DICT, SETITEM, SETITEMS
            b'}' => self.new_dict(),
            b's' => self.set_items(2),
            b'u' => self.pop_mark().and_then(|len| self.set_items(len)),
            // GLOBAL, REDUCE, BUILD, BINPERSID
            b'c' => self.import(),
            b'R' => self.reduce(),
            b'b' => self.build(),
            b'Q' => self.persistent(),
            other => Err(Error::model(format!("opcode 0x{other:02x} is not one of a state dict"))),
        }
    }

    // ---- input

    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(len).filter(|&end| end <= self.input.len());
        let end = end.ok_or_else(|| malformed("it ends in the middle of a value"))?;
        let bytes = &self.input[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn byte(&mut self) -> Result<u8> {
        self.take(1).map(|b| b[0])
    }

    fn u32(&mut self) -> Result<u32> {
        self.take(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    fn line(&mut self) -> Result<&'a str> {
        let rest = &self.input[self.at..];
        let len = rest.iter().position(|&b| b == b'\n');
        let line = self.take(len.ok_or_else(|| malformed("a name has no end"))?)?;
        self.at += 1;
        std::str::from_utf8(line).map_err(|e| malformed("a name is not UTF-8").because(e))
    }

    // ---- stack

    fn push(&mut self, value: Value<'a>) -> Result<()> {
        self.stack.push(value);
        Ok(())
    }

    /// Takes the top value, never one from below the last mark.
    fn pop(&mut self) -> Result<Value<'a>> {
        if self.stack.len() <= self.marks.last().copied().unwrap_or(0) {
            return Err(malformed("a value is missing from the stack"));
        }
        self.stack.pop().ok_or_else(|| malformed("the stack is empty"))
    }

    /// Removes the last mark; returns how many values lie above it.
    fn pop_mark(&mut self) -> Result<usize> {
        let mark = self.marks.pop().ok_or_else(|| malformed("a mark is missing"))?;
        Ok(self.stack.len() - mark)
    }

    /// Takes the top `len` values in the order they were pushed.
    fn pop_many(&mut self, len: usize) -> Result<std::vec::Drain<'_, Value<'a>>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len().checked_sub(len).filter(|&start| start >= floor) {
            Some(start) => Ok(self.stack.drain(start..)),
            None => Err(malformed("a value is missing from the stack")),
        }
    }

    fn remember(&mut self, slot: u32) -> Result<()> {
        let top = self.pop()?;
        self.memo.insert(slot, top);
        self.push(top)
    }

    fn recall(&mut self, slot: u32) -> Result<()> {
        let value = self.memo.get(&slot).copied();
        self.push(value.ok_or_else(|| malformed("an unknown memo is recalled"))?)
    }

    // ---- values

    /// BININT1 and BININT2 are unsigned, BININT is signed.
    fn integer(&mut self, size: usize) -> Result<()> {
        let value = match *self.take(size)? {
            [a] => i64::from(a),
            [a, b] => i64::from(u16::from_le_bytes([a, b])),
            [a, b, c, d] => i64::from(i32::from_le_bytes([a, b, c, d])),
            _ => return Err(malformed("an integer of unknown size")),
        };
        self.push(Value::Int(value))
    }

    /// LONG1: a length byte, then that many bytes of little-endian two's complement.
    fn long(&mut self) -> Result<()> {
        let size = usize::from(self.byte()?);
        let bytes = self.take(size)?;
        if size > 8 {
            return Err(malformed("an integer of more than 64 bits"));
        }
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let mut wide = if negative { [0xff; 8] } else { [0; 8] };
        wide[..size].copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(wide)))
    }

    fn tuple(&mut self, len: usize) -> Result<()> {
        let start = self.items.len();
        let mut items = std::mem::take(&mut self.items);
        let popped = self.pop_many(len).map(|values| items.extend(values));
        self.items = items;
        popped?;
        self.push(Value::Tuple { start, len })
    }

    fn append(&mut self, len: usize) -> Result<()> {
        self.pop_many(len)?;
        match self.stack.last() {
            Some(Value::Ignored) => Ok(()),
            _ => Err(malformed("something is appended to what is not a list")),
        }
    }

    fn new_dict(&mut self) -> Result<()> {
        self.dicts.push(Vec::new());
        self.push(Value::Dict(self.dicts.len() - 1))
    }

    /// Puts the top `len` values, keys and values in turn, into the dictionary below them.
    fn set_items(&mut self, len: usize) -> Result<()> {
        if !len.is_multiple_of(2) {
            return Err(malformed("a dictionary key has no value"));
        }
        let values: Vec<_> = self.pop_many(len)?.collect();
        let Some(&Value::Dict(index)) = self.stack.last() else {
            return Err(malformed("an item is set in what is not a dictionary"));
        };
        self.dicts[index].extend(values.chunks_exact(2).map(|pair| (pair[0], pair[1])));
        Ok(())
    }

    fn import(&mut self) -> Result<()> {
        let (module, name) = (self.line()?, self.line()?);
        match Import::find(module, name) {
            Some(import) => self.push(Value::Import(import)),
            None => Err(Error::model(format!(
                "it imports {:?}, which no weight file needs",
                format!("{module}.{name}")
            ))
            .hint("only take .bin checkpoints from a source you trust; this one was not executed")),
        }
    }

    /// The items of a tuple.
    fn items(&self, value: Value<'a>) -> Result<&[Value<'a>]> {
        match value {
            // Tuples are made in one place, always within the arena.
            Value::Tuple { start, len } => Ok(&self.items[start..start + len]),
            other => Err(malformed(&format!("{} where a tuple belongs", other.kind()))),
        }
    }

    /// BINPERSID: ("storage", type, key, device, number of elements).
    fn persistent(&mut self) -> Result<()> {
        let id = self.pop()?;
        let storage = match *self.items(id)? {
            [
                Value::Text("storage"),
                Value::Import(Import::StorageType(dtype)),
                Value::Text(key),
                Value::Text(_),
                Value::Int(len),
            ] => Storage { dtype, key, len: size(len)? },
            _ => return Err(malformed("a persistent id is not a storage")),
        };
        self.push(Value::Storage(storage))
    }

    fn reduce(&mut self) -> Result<()> {
        let arguments = self.pop()?;
        let Value::Import(function) = self.pop()? else {
            return Err(malformed("something is called that is not an import"));
        };
        self.call(function, arguments)
    }

    fn call(&mut self, function: Import, arguments: Value<'a>) -> Result<()> {
        let arguments = self.items(arguments)?;
        match (function, arguments) {
            (Import::OrderedDict, []) => self.new_dict(),
            (
                Import::RebuildTensor,
                &[Value::Storage(storage), Value::Int(offset), shape, strides, ..],
            ) => {
                let tensor = PickledTensor {
                    storage,
                    offset: size(offset)?,
                    shape: self.sizes(shape)?,
                    strides: self.sizes(strides)?,
                };
                if tensor.shape.len() != tensor.strides.len() {
                    return Err(malformed("a tensor's shape and strides differ in length"));
                }
                self.tensors.push(tensor);
                self.push(Value::Tensor(self.tensors.len() - 1))
            }
            // (tensor, requires_grad, hooks): the tensor.
            (Import::RebuildParameter, &[tensor @ Value::Tensor(_), ..]) => self.push(tensor),
            // (function, type, its arguments, attributes): the function's result. One level:
            // torch never nests it, and recursion here would be the pickle's to choose.
            (
                Import::RebuildFromType,
                &[
                    Value::Import(inner @ (Import::RebuildTensor | Import::RebuildParameter)),
                    Value::Import(Import::TensorType),
                    inner_arguments,
                    _,
                ],
            ) => self.call(inner, inner_arguments),
            _ => {
                Err(malformed(&format!("{function:?} is called with arguments of the wrong kind")))
            }
        }
    }

    fn sizes(&self, value: Value<'a>) -> Result<Vec<usize>> {
        let items = self.items(value)?;
        if items.len() > MAX_DIMS {
            return Err(malformed(&format!("a tensor of {} dimensions", items.len())));
        }
        items
            .iter()
            .map(|item| match *item {
                Value::Int(value) => size(value),
                other => Err(malformed(&format!("{} where a size belongs", other.kind()))),
            })
            .collect()
    }

    /// BUILD gives an object its attributes (`_metadata` of a state dict): ignored.
    fn build(&mut self) -> Result<()> {
        self.pop()?;
        match self.stack.last() {
            Some(Value::Dict(_) | Value::Tensor(_)) => Ok(()),
            _ => Err(malformed("attributes are set on what has none")),
        }
    }

    fn finish(&mut self, top: Value<'a>) -> Result<Vec<(&'a str, PickledTensor<'a>)>> {
        let Value::Dict(index) = top else {
            return Err(Error::model(format!("it holds {}, not a dictionary", top.kind())));
        };
        self.dicts[index]
            .iter()
            .map(|&(key, value)| match (key, value) {
                (Value::Text(name), Value::Tensor(tensor)) => {
                    Ok((name, self.tensors[tensor].clone()))
                }
                (Value::Text(name), other) => {
                    Err(Error::model(format!("{name:?} is {}, not a tensor", other.kind())))
                }
                (key, _) => Err(Error::model(format!("a key is {}, not a string", key.kind()))),
            })
            .collect()
    }
}

fn size(value: i64) -> Result<usize> {
    usize::try_from(value).map_err(|_| malformed(&format!("the negative size {value}")))
}
