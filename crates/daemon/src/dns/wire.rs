//! Questions and answers of the name server, as bytes. Pure: what the names mean is a parameter.
//!
//! Only what a server of one small zone needs: one question, answers that always fit into the smallest datagram. Whatever is not of
//! that form is answered with an error code, or not at all.

use std::net::Ipv4Addr;

/// Longest question that is looked at.
pub const MAX_QUERY: usize = 4096;

/// How long an answer may be kept, in seconds: a machine may be gone, or be called otherwise, at any time.
const TTL: u32 = 1;

const HEADER: usize = 12;
const MAX_NAME: usize = 255;
const MAX_LABEL: usize = 63;
/// Payload of a datagram that fits everywhere.
const DATAGRAM: u16 = 1232;
/// Most records that are looked through for EDNS.
const MAX_RECORDS: u16 = 4;

const A: u16 = 1;
const SOA: u16 = 6;
const OPT: u16 = 41;
const ANY: u16 = 255;
const IN: u16 = 1;

/// The zone, as a name on the wire.
const ZONE: &[u8] = b"\x02vm\0";

const ANSWER: u8 = 0x80;
const OPCODE: u8 = 0x78;
const AUTHORITATIVE: u8 = 0x04;
const RECURSION_DESIRED: u8 = 0x01;

/// Codes of answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Code {
    NoError = 0,
    FormErr = 1,
    NxDomain = 3,
    NotImp = 4,
    Refused = 5,
    /// In the extended part.
    BadVers = 16,
}

/// EDNS as it was asked with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Edns {
    version: u8,
    /// The asker wants DNSSEC records. It gets none, but its bit back.
    dnssec: bool,
}

/// A question.
#[derive(Debug, PartialEq, Eq)]
struct Question<'a> {
    /// Its bytes, to be sent back as they came: some askers vary the case to know their answers by it.
    bytes: &'a [u8],
    /// Labels in lower case.
    labels: Vec<Vec<u8>>,
    kind: u16,
    class: u16,
}

/// The answer to a query; none to what is no query. `lookup` tells the address of a machine by its name.
pub fn answer(query: &[u8], lookup: impl FnOnce(&str) -> Option<Ipv4Addr>) -> Option<Vec<u8>> {
    let header: &[u8; HEADER] = query.first_chunk()?;
    let count = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    if header[2] & ANSWER != 0 {
        return None;
    }
    if header[2] & OPCODE != 0 {
        return Some(reply(header, Code::NotImp, None, None, Section::Nothing));
    }
    let parsed = if count(4) == 1 { question(query) } else { None };
    let Some((question, rest)) = parsed else {
        return Some(reply(header, Code::FormErr, None, None, Section::Nothing));
    };
    let plain = count(6) == 0 && count(8) == 0;
    let edns = match (plain, edns(rest, count(10))) {
        (true, Ok(edns)) => edns,
        _ => return Some(reply(header, Code::FormErr, Some(&question), None, Section::Nothing)),
    };
    let (code, section) = match edns {
        Some(Edns { version: 1.., .. }) => (Code::BadVers, Section::Nothing),
        _ => resolve(&question, lookup),
    };
    Some(reply(header, code, Some(&question), edns, section))
}

/// What stands in an answer beside the question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Section {
    Nothing,
    Address(Ipv4Addr),
    /// The zone's record as the answer.
    Zone,
    /// The zone's record beside an answer that there is nothing, which says how long that may be kept.
    Negative,
}

fn resolve(question: &Question<'_>, lookup: impl FnOnce(&str) -> Option<Ipv4Addr>) -> (Code, Section) {
    let class = matches!(question.class, IN | ANY);
    let labels: Vec<&[u8]> = question.labels.iter().map(Vec::as_slice).collect();
    match labels.as_slice() {
        [.., b"vm"] if !class => (Code::Refused, Section::Nothing),
        [b"vm"] if matches!(question.kind, SOA | ANY) => (Code::NoError, Section::Zone),
        [b"vm"] => (Code::NoError, Section::Negative),
        [name, b"vm"] => match std::str::from_utf8(name).ok().and_then(lookup) {
            None => (Code::NxDomain, Section::Negative),
            Some(address) if matches!(question.kind, A | ANY) => (Code::NoError, Section::Address(address)),
            Some(_) => (Code::NoError, Section::Negative),
        },
        [.., b"vm"] => (Code::NxDomain, Section::Negative),
        // Not ours to say.
        _ => (Code::Refused, Section::Nothing),
    }
}

/// The question, and what comes behind it.
fn question(query: &[u8]) -> Option<(Question<'_>, &[u8])> {
    let body = query.get(HEADER..)?;
    let (labels, length) = name(body)?;
    let fixed: &[u8; 4] = body.get(length..)?.first_chunk()?;
    let (bytes, rest) = body.split_at_checked(length + 4)?;
    let question = Question {
        bytes,
        labels,
        kind: u16::from_be_bytes([fixed[0], fixed[1]]),
        class: u16::from_be_bytes([fixed[2], fixed[3]]),
    };
    Some((question, rest))
}

/// The labels of a name at the beginning of `bytes`, in lower case, and its length. Pointers have no place in a question.
fn name(bytes: &[u8]) -> Option<(Vec<Vec<u8>>, usize)> {
    let mut labels = Vec::new();
    let mut at = 0;
    loop {
        let length = usize::from(*bytes.get(at)?);
        at += 1;
        if length == 0 {
            return (at <= MAX_NAME).then_some((labels, at));
        }
        if length > MAX_LABEL || at + length > MAX_NAME {
            return None;
        }
        labels.push(bytes.get(at..at + length)?.to_ascii_lowercase());
        at += length;
    }
}

/// EDNS among `count` further records. An error where they are no records.
fn edns(mut rest: &[u8], count: u16) -> Result<Option<Edns>, ()> {
    let mut found = None;
    if count > MAX_RECORDS {
        return Err(());
    }
    for _ in 0..count {
        let (labels, length) = name(rest).ok_or(())?;
        let fixed: &[u8; 10] = rest.get(length..).and_then(<[u8]>::first_chunk).ok_or(())?;
        let kind = u16::from_be_bytes([fixed[0], fixed[1]]);
        let data = usize::from(u16::from_be_bytes([fixed[8], fixed[9]]));
        rest = rest.get(length + 10 + data..).ok_or(())?;
        if kind == OPT {
            if found.is_some() || !labels.is_empty() {
                return Err(());
            }
            found = Some(Edns {
                version: fixed[5],
                dnssec: fixed[6] & 0x80 != 0,
            });
        }
    }
    Ok(found)
}

fn reply(
    header: &[u8; HEADER],
    code: Code,
    question: Option<&Question<'_>>,
    edns: Option<Edns>,
    section: Section,
) -> Vec<u8> {
    let (answers, authority) = match section {
        Section::Nothing => (0u16, 0u16),
        Section::Address(_) | Section::Zone => (1, 0),
        Section::Negative => (0, 1),
    };
    let ours = !matches!(code, Code::FormErr | Code::NotImp | Code::Refused | Code::BadVers);
    let authoritative = if ours { AUTHORITATIVE } else { 0 };
    let mut out = Vec::with_capacity(512);
    out.extend_from_slice(&header[..2]);
    out.push(ANSWER | (header[2] & (OPCODE | RECURSION_DESIRED)) | authoritative);
    out.push(code as u8 & 0x0f);
    for count in [
        u16::from(question.is_some()),
        answers,
        authority,
        u16::from(edns.is_some()),
    ] {
        out.extend_from_slice(&count.to_be_bytes());
    }
    if let Some(question) = question {
        out.extend_from_slice(question.bytes);
    }
    match section {
        Section::Nothing => {}
        Section::Address(address) => {
            // The name of the question, which begins behind the header.
            record(&mut out, &[0xc0, 0x0c], A, &address.octets());
        }
        Section::Zone | Section::Negative => {
            // Primary server, mailbox (none), serial, refresh, retry, expire, and how long "there is none" may be kept.
            let mut data = [ZONE, b"\0"].concat();
            for number in [1, 3600, 600, 86_400, TTL] {
                data.extend_from_slice(&number.to_be_bytes());
            }
            record(&mut out, ZONE, SOA, &data);
        }
    }
    if let Some(edns) = edns {
        out.push(0);
        out.extend_from_slice(&OPT.to_be_bytes());
        out.extend_from_slice(&DATAGRAM.to_be_bytes());
        out.extend_from_slice(&[(code as u16 >> 4) as u8, 0, if edns.dnssec { 0x80 } else { 0 }, 0, 0, 0]);
    }
    out
}

fn record(out: &mut Vec<u8>, name: &[u8], kind: u16, data: &[u8]) {
    out.extend_from_slice(name);
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&IN.to_be_bytes());
    out.extend_from_slice(&TTL.to_be_bytes());
    out.extend_from_slice(&u16::try_from(data.len()).unwrap_or(0).to_be_bytes());
    out.extend_from_slice(data);
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
