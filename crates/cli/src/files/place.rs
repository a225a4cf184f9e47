//! Where a copy goes: what `cp -r` does with the same source and destination, on either side.

/// What is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    File,
    Directory,
    /// What is in a directory, not the directory: `DIR/.`.
    Content,
}

/// What stands at a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Directory,
    /// A device, a pipe or a socket.
    Special,
}

/// What was found at a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    Nothing,
    /// This.
    Itself(Kind),
    /// A link to this.
    Link(Kind),
    /// A link that leads nowhere.
    Dangling,
}

/// Where the copy goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Into the directory at the destination, under the source's name (or without one, for a directory's content).
    Into,
    /// It becomes the destination itself.
    As,
    /// It replaces the file that the link at the destination leads to. The link stays.
    Through,
}

/// Why there is no place for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// A directory was named that is not there.
    NoDirectory,
    /// A directory is needed, and something else is there.
    NotADirectory,
    /// A directory stands where a file is to go.
    IsADirectory,
    /// The link leads nowhere.
    Dangling,
    /// A device, a pipe or a socket.
    Special,
}

impl Refusal {
    /// What is wrong with the destination.
    pub(crate) fn why(self) -> &'static str {
        match self {
            Self::NoDirectory => "does not exist",
            Self::NotADirectory => "is not a directory",
            Self::IsADirectory => "is a directory",
            Self::Dangling => "is a link that leads nowhere",
            Self::Special => "is neither file nor directory",
        }
    }
}

/// Finds the place at the destination that the user named. `slash`: its name ends in one, so it means a directory.
pub(crate) fn place(source: Source, found: Found, slash: bool) -> Result<Place, Refusal> {
    match (source, found) {
        (_, Found::Itself(Kind::Directory) | Found::Link(Kind::Directory)) => Ok(Place::Into),
        (Source::File, Found::Nothing) if slash => Err(Refusal::NoDirectory),
        (_, Found::Nothing) => Ok(Place::As),
        (_, Found::Dangling) => Err(Refusal::Dangling),
        (Source::Directory | Source::Content, _) => Err(Refusal::NotADirectory),
        (Source::File, _) if slash => Err(Refusal::NotADirectory),
        (Source::File, Found::Itself(Kind::Special) | Found::Link(Kind::Special)) => Err(Refusal::Special),
        (Source::File, Found::Itself(Kind::File)) => Ok(Place::As),
        (Source::File, Found::Link(Kind::File)) => Ok(Place::Through),
    }
}

/// Finds the place of a file or a directory under its own name in a directory. A directory is merged with one that is there.
pub(crate) fn place_named(source: Source, found: Found) -> Result<Place, Refusal> {
    match (source, found) {
        (Source::File, Found::Itself(Kind::Directory) | Found::Link(Kind::Directory)) => Err(Refusal::IsADirectory),
        (Source::Directory | Source::Content, Found::Nothing | Found::Itself(Kind::Directory)) => Ok(Place::As),
        (Source::Directory | Source::Content, _) => Err(Refusal::NotADirectory),
        (Source::File, _) => place(source, found, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_user_named_is_judged_with_links_followed() {
        use Found as F;
        use Kind as K;
        use Source as S;
        for (source, found, slash, expected) in [
            (S::File, F::Nothing, false, Ok(Place::As)),
            (S::File, F::Nothing, true, Err(Refusal::NoDirectory)),
            (S::Directory, F::Nothing, true, Ok(Place::As)),
            (S::Content, F::Nothing, false, Ok(Place::As)),
            (S::File, F::Link(K::Directory), false, Ok(Place::Into)),
            (S::Directory, F::Link(K::Directory), true, Ok(Place::Into)),
            (S::File, F::Link(K::File), false, Ok(Place::Through)),
            (S::File, F::Link(K::File), true, Err(Refusal::NotADirectory)),
            (S::File, F::Itself(K::File), true, Err(Refusal::NotADirectory)),
            (S::Directory, F::Itself(K::File), false, Err(Refusal::NotADirectory)),
            (S::Directory, F::Dangling, true, Err(Refusal::Dangling)),
            (S::File, F::Dangling, false, Err(Refusal::Dangling)),
            (S::File, F::Itself(K::Special), false, Err(Refusal::Special)),
            (S::File, F::Link(K::Special), false, Err(Refusal::Special)),
        ] {
            assert_eq!(place(source, found, slash), expected, "{source:?} {found:?} {slash}");
        }
    }

    #[test]
    fn what_has_the_sources_name_is_not_replaced_by_another_kind() {
        use Found as F;
        use Kind as K;
        for found in [F::Link(K::Directory), F::Link(K::File), F::Dangling, F::Itself(K::File)] {
            assert_eq!(
                place_named(Source::Directory, found),
                Err(Refusal::NotADirectory),
                "{found:?}"
            );
        }
        assert_eq!(place_named(Source::Directory, F::Itself(K::Directory)), Ok(Place::As));
        assert_eq!(
            place_named(Source::File, F::Link(K::Directory)),
            Err(Refusal::IsADirectory)
        );
        assert_eq!(place_named(Source::File, F::Link(K::File)), Ok(Place::Through));
        assert_eq!(place_named(Source::File, F::Nothing), Ok(Place::As));
    }
}
