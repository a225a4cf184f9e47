//! As much of D-Bus as it takes to ask systemd for a scope: messages of a few types, written and read. No I/O.

/// Longest message that is read.
pub(super) const LONGEST: usize = 1 << 20;
/// Length of the fixed part of a message.
pub(super) const FIXED: usize = 16;

/// A method call.
const CALL: u8 = 1;
/// Kinds of messages that are read.
pub(super) const RETURN: u8 = 2;
pub(super) const ERROR: u8 = 3;
pub(super) const SIGNAL: u8 = 4;

/// Writes values in little-endian order, each aligned as its type has to be.
#[derive(Debug, Default)]
pub(super) struct Writer(Vec<u8>);

impl Writer {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.align(4);
        self.0.extend(value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.align(8);
        self.0.extend(value.to_le_bytes());
    }

    /// A string, or the path of an object.
    pub(super) fn string(&mut self, text: &str) {
        self.u32(u32::try_from(text.len()).unwrap_or(u32::MAX));
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    fn signature(&mut self, text: &str) {
        self.0.push(text.len() as u8);
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    /// An array; its elements are aligned to so many bytes.
    pub(super) fn array(&mut self, align: usize, elements: impl FnOnce(&mut Self)) {
        self.u32(0);
        let length_at = self.0.len() - 4;
        self.align(align);
        let begin = self.0.len();
        elements(self);
        let length = (self.0.len() - begin) as u32;
        self.0[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
    }

    /// A structure.
    pub(super) fn structure(&mut self) {
        self.align(8);
    }

    /// A value with its type.
    pub(super) fn variant(&mut self, value: &Value<'_>) {
        match value {
            Value::Text(text) => {
                self.signature("s");
                self.string(text);
            }
            Value::Number(number) => {
                self.signature("t");
                self.u64(*number);
            }
            Value::Processes(pids) => {
                self.signature("au");
                self.array(4, |w| pids.iter().for_each(|pid| w.u32(*pid)));
            }
        }
    }
}

/// A property's value.
#[derive(Debug)]
pub(super) enum Value<'a> {
    /// `s`
    Text(&'a str),
    /// `t`
    Number(u64),
    /// `au`
    Processes(&'a [u32]),
}

/// A method call of systemd's manager.
pub(super) fn call(serial: u32, member: &str, signature: &str, body: Writer) -> Vec<u8> {
    let body = body.0;
    let mut w = Writer(vec![b'l', CALL, 0, 1]);
    w.u32(body.len() as u32);
    w.u32(serial);
    w.array(8, |w| {
        let mut field = |code: u8, kind: &str, text: &str| {
            w.structure();
            w.0.push(code);
            w.signature(kind);
            if kind == "g" { w.signature(text) } else { w.string(text) }
        };
        field(1, "o", "/org/freedesktop/systemd1");
        field(2, "s", "org.freedesktop.systemd1.Manager");
        field(3, "s", member);
        field(6, "s", "org.freedesktop.systemd1");
        if !signature.is_empty() {
            field(8, "g", signature);
        }
    });
    w.align(8);
    w.0.extend(body);
    w.0
}

/// What is read of a message.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Message {
    /// [`RETURN`], [`ERROR`], [`SIGNAL`] or another kind.
    pub(super) kind: u8,
    /// To which call it is the answer.
    pub(super) reply_to: u32,
    /// Name of a signal.
    pub(super) member: String,
    /// Name of an error.
    pub(super) error: String,
    /// The strings, paths and numbers that its body begins with, as text.
    pub(super) body: Vec<String>,
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(length)?;
        let part = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(part)
    }

    fn align(&mut self, to: usize) -> Option<()> {
        let skip = self.at.next_multiple_of(to) - self.at;
        self.take(skip).map(drop)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|b| b[0])
    }

    fn u32(&mut self) -> Option<u32> {
        self.align(4)?;
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn text(&mut self, length: usize) -> Option<String> {
        let text = String::from_utf8_lossy(self.take(length)?).into_owned();
        self.take(1)?;
        Some(text)
    }

    fn string(&mut self) -> Option<String> {
        let length = self.u32()? as usize;
        self.text(length)
    }

    fn signature(&mut self) -> Option<String> {
        let length = self.u8()? as usize;
        self.text(length)
    }

    /// A value of one of the simple types that are needed, as text.
    fn simple(&mut self, kind: char) -> Option<String> {
        match kind {
            's' | 'o' => self.string(),
            'g' => self.signature(),
            'u' => self.u32().map(|n| n.to_string()),
            _ => None,
        }
    }
}

/// Length of a message's rest, from its fixed part; none if that makes no sense.
pub(super) fn rest(fixed: &[u8; FIXED]) -> Option<usize> {
    if fixed[0] != b'l' || fixed[3] != 1 {
        return None;
    }
    let mut reader = Reader { bytes: fixed, at: 4 };
    let body = reader.u32()? as usize;
    reader.u32()?;
    let fields = reader.u32()? as usize;
    if body > LONGEST || fields > LONGEST {
        return None;
    }
    Some((FIXED + fields).next_multiple_of(8) - FIXED + body)
}

/// Reads a message.
pub(super) fn parse(bytes: &[u8]) -> Option<Message> {
    let mut reader = Reader { bytes, at: 1 };
    let mut message = Message {
        kind: reader.u8()?,
        ..Message::default()
    };
    reader.at = 12;
    let end = reader.u32()? as usize + FIXED;
    let mut signature = String::new();
    while reader.at < end {
        reader.align(8)?;
        let code = reader.u8()?;
        let kind = reader.signature()?;
        let value = reader.simple(kind.chars().next()?)?;
        match code {
            3 => message.member = value,
            4 => message.error = value,
            5 => message.reply_to = value.parse().ok()?,
            8 => signature = value,
            _ => {}
        }
    }
    reader.align(8)?;
    for kind in signature.chars() {
        match reader.simple(kind) {
            Some(value) => message.body.push(value),
            None => break,
        }
    }
    Some(message)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_call_is_read_as_it_was_written() {
        let mut body = Writer::default();
        body.string("banger-machine-x.scope");
        body.string("fail");
        body.array(8, |w| {
            w.structure();
            w.string("PIDs");
            w.variant(&Value::Processes(&[7, 8]));
            w.structure();
            w.string("MemoryMax");
            w.variant(&Value::Number(1 << 30));
        });
        body.array(8, |_| {});
        let bytes = call(3, "StartTransientUnit", "ssa(sv)a(sa(sv))", body);
        let fixed: [u8; FIXED] = bytes[..FIXED].try_into().unwrap();
        assert_eq!(rest(&fixed), Some(bytes.len() - FIXED));
        let message = parse(&bytes).unwrap();
        assert_eq!((message.kind, message.member.as_str()), (CALL, "StartTransientUnit"));
        assert_eq!(message.body, ["banger-machine-x.scope", "fail"]);
    }

    proptest! {
        #[test]
        fn nothing_that_comes_makes_it_fall(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
            if let Some(fixed) = bytes.first_chunk::<FIXED>() {
                let _ = rest(fixed);
            }
        }
    }
}
