//! Enough of ELF and BTF (kernel documentation, bpf/btf) to see what a BPF object says about its maps.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};

/// The memory layout of a type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// An integer of so many bytes.
    Integer(usize),
    /// So many elements.
    Array(Box<Shape>, usize),
    /// A struct: its size, and each member's name, offset and shape.
    Struct(usize, Vec<(String, usize, Shape)>),
}

impl Shape {
    /// Size in bytes.
    pub(crate) fn size(&self) -> usize {
        match self {
            Self::Integer(size) | Self::Struct(size, _) => *size,
            Self::Array(element, length) => element.size() * length,
        }
    }

    /// Names of a struct's members, those of nested structs included.
    pub(crate) fn names(&self) -> Vec<&str> {
        match self {
            Self::Integer(_) => Vec::new(),
            Self::Array(element, _) => element.names(),
            Self::Struct(_, members) => members
                .iter()
                .flat_map(|(name, _, shape)| std::iter::once(name.as_str()).chain(shape.names()))
                .collect(),
        }
    }
}

/// Key and value of each map in the object's `.maps` section.
pub(crate) fn maps(object: &[u8]) -> Result<BTreeMap<String, (Shape, Shape)>> {
    let btf = Btf::parse(section(object, ".BTF")?)?;
    let maps = btf.types.iter().find(|ty| ty.kind == DATASEC && ty.name == ".maps").context("no .maps in the BTF")?;
    maps.members
        .iter()
        .map(|(_, id, _)| {
            let variable = btf.get(*id)?;
            let definition = btf.get(variable.reference)?;
            let pointed = |field: &str| -> Result<Shape> {
                let (_, pointer, _) = definition
                    .members
                    .iter()
                    .find(|(name, _, _)| name == field)
                    .with_context(|| format!("map {} has no {field}", variable.name))?;
                btf.shape(btf.get(*pointer)?.reference)
            };
            Ok((variable.name.clone(), (pointed("key")?, pointed("value")?)))
        })
        .collect()
}

fn word(bytes: &[u8], at: usize) -> Result<u32> {
    let slice = bytes.get(at..at + 4).with_context(|| format!("truncated at {at}"))?;
    Ok(u32::from_le_bytes(slice.try_into()?))
}

fn long(bytes: &[u8], at: usize) -> Result<usize> {
    let slice = bytes.get(at..at + 8).with_context(|| format!("truncated at {at}"))?;
    Ok(usize::try_from(u64::from_le_bytes(slice.try_into()?))?)
}

fn text(bytes: &[u8], at: usize) -> Result<String> {
    let rest = bytes.get(at..).context("a name outside the string table")?;
    Ok(String::from_utf8_lossy(rest.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned())
}

/// A section of a 64-bit little-endian ELF file.
fn section<'a>(object: &'a [u8], wanted: &str) -> Result<&'a [u8]> {
    ensure!(object.starts_with(b"\x7fELF\x02\x01"), "no 64-bit little-endian ELF file");
    let headers = long(object, 40)?;
    let counts = word(object, 60)?;
    let (count, names) = ((counts & 0xffff) as usize, (counts >> 16) as usize);
    let content = |index: usize| -> Result<&'a [u8]> {
        let header = headers + index * 64;
        let (offset, size) = (long(object, header + 24)?, long(object, header + 32)?);
        object.get(offset..offset + size).context("a section outside the file")
    };
    for index in 0..count {
        if text(content(names)?, word(object, headers + index * 64)? as usize)? == wanted {
            return content(index);
        }
    }
    bail!("no section {wanted}")
}

const INT: u32 = 1;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const TYPEDEF: u32 = 8;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const DECL_TAG: u32 = 17;
const ENUM64: u32 = 19;

struct Type {
    name: String,
    kind: u32,
    /// Size in bytes, for kinds that have one.
    size: usize,
    /// The type referred to, for kinds that have one; an array's element.
    reference: u32,
    /// Number of elements of an array.
    length: usize,
    /// Members of a struct (name, type, offset in bits), variables of a section.
    members: Vec<(String, u32, usize)>,
}

struct Btf {
    /// Type 1 and those after it.
    types: Vec<Type>,
}

impl Btf {
    fn parse(section: &[u8]) -> Result<Self> {
        ensure!(word(section, 0)? & 0xffff == 0xeb9f, "no BTF magic");
        let header = word(section, 4)? as usize;
        let part = |at: usize| -> Result<&[u8]> {
            let (start, length) = (header + word(section, at)? as usize, word(section, at + 4)? as usize);
            section.get(start..start + length).context("a part outside the section")
        };
        let (types, strings) = (part(8)?, part(16)?);
        let mut parsed = Vec::new();
        let mut at = 0;
        while at < types.len() {
            let (information, third) = (word(types, at + 4)?, word(types, at + 8)?);
            let (kind, count) = (information >> 24 & 0x1f, (information & 0xffff) as usize);
            let mut ty = Type {
                name: text(strings, word(types, at)? as usize)?,
                kind,
                size: third as usize,
                reference: third,
                length: 0,
                members: Vec::new(),
            };
            at += 12;
            let extra = match kind {
                INT | VAR | DECL_TAG => 4,
                ARRAY => {
                    ty.reference = word(types, at)?;
                    ty.length = word(types, at + 8)? as usize;
                    12
                }
                STRUCT | UNION | DATASEC | ENUM64 => {
                    for member in (at..).step_by(12).take(count) {
                        let (first, second) = (word(types, member)?, word(types, member + 4)?);
                        ty.members.push(match kind {
                            DATASEC => (String::new(), first, second as usize),
                            _ => (text(strings, first as usize)?, second, word(types, member + 8)? as usize),
                        });
                    }
                    12 * count
                }
                ENUM | FUNC_PROTO => 8 * count,
                _ => 0,
            };
            at += extra;
            parsed.push(ty);
        }
        Ok(Self { types: parsed })
    }

    fn get(&self, id: u32) -> Result<&Type> {
        let index = (id as usize).checked_sub(1).context("void")?;
        self.types.get(index).with_context(|| format!("no BTF type {id}"))
    }

    fn shape(&self, id: u32) -> Result<Shape> {
        let ty = self.get(id)?;
        Ok(match ty.kind {
            INT => Shape::Integer(ty.size),
            TYPEDEF => self.shape(ty.reference)?,
            ARRAY => Shape::Array(Box::new(self.shape(ty.reference)?), ty.length),
            STRUCT => {
                let members = ty.members.iter().map(|(name, id, bits)| {
                    ensure!(bits % 8 == 0, "{}.{name} is a bit field", ty.name);
                    Ok((name.clone(), bits / 8, self.shape(*id)?))
                });
                Shape::Struct(ty.size, members.collect::<Result<_>>()?)
            }
            other => bail!("{} is of BTF kind {other}, which no map type should be", ty.name),
        })
    }
}
