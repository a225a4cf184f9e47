//! The positional arguments of `vm run`: a workspace, an image, both or neither.

/// What `vm run` was pointed at.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RunTarget {
    /// Directory of a repository.
    pub workspace: Option<String>,
    /// Image reference.
    pub image: Option<String>,
}

/// Why the arguments make no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ArgumentError {
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub hint: String,
}

/// Whether an argument names a path: it starts with `.`, `/` or `~`.
pub fn is_path(argument: &str) -> bool {
    argument.starts_with(['.', '/', '~'])
}

/// Sorts the positional arguments into workspace and image.
pub fn classify(arguments: &[String]) -> Result<RunTarget, ArgumentError> {
    let mut target = RunTarget::default();
    for argument in arguments {
        let (slot, kind, rule) = if is_path(argument) {
            (
                &mut target.workspace,
                "workspace",
                "a workspace starts with `.`, `/` or `~`",
            )
        } else {
            (
                &mut target.image,
                "image",
                "a workspace starts with `.`, `/` or `~`; what to run in the machine follows `--`",
            )
        };
        if let Some(first) = slot {
            let message = format!(
                "two {kind}s given: `{}` and `{}`",
                first.escape_default(),
                argument.escape_default()
            );
            return Err(ArgumentError {
                message,
                hint: rule.to_owned(),
            });
        }
        if argument.is_empty() {
            return Err(ArgumentError {
                message: "an argument is empty".to_owned(),
                hint: "give a path or an image name".to_owned(),
            });
        }
        *slot = Some(argument.clone());
    }
    Ok(target)
}

/// The hint for an image that is unknown while a directory of that name exists.
pub fn hint_for_directory(image: &str, is_directory: impl Fn(&str) -> bool) -> Option<String> {
    is_directory(image).then(|| format!("to use the directory as workspace, write `./{image}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classify_words(words: &str) -> Result<RunTarget, ArgumentError> {
        classify(&words.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn first_character_decides() {
        for (words, workspace, image) in [
            ("", None, None),
            ("./repo", Some("./repo"), None),
            (".", Some("."), None),
            ("/src/x", Some("/src/x"), None),
            ("~/x", Some("~/x"), None),
            ("debian", None, Some("debian")),
            ("debian ./repo", Some("./repo"), Some("debian")),
            ("../a debian-slim", Some("../a"), Some("debian-slim")),
        ] {
            let target = classify_words(words).unwrap();
            assert_eq!(
                (target.workspace.as_deref(), target.image.as_deref()),
                (workspace, image),
                "{words}"
            );
        }
    }

    #[test]
    fn two_of_a_kind_are_refused() {
        assert!(
            classify_words("./a ./b")
                .unwrap_err()
                .message
                .contains("two workspaces")
        );
        assert!(classify_words("debian make").unwrap_err().hint.contains("--"));
        assert!(classify(&[String::new()]).is_err());
    }

    #[test]
    fn a_directory_of_that_name_gives_a_hint() {
        assert_eq!(
            hint_for_directory("repo", |d| d == "repo").unwrap(),
            "to use the directory as workspace, write `./repo`"
        );
        assert_eq!(hint_for_directory("debian", |_| false), None);
    }
}
