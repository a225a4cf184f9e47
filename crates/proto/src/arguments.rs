//! How much a program can be given when it is started: the limits of Linux, checked before anything is sent.

use crate::frame::Open;

/// Most bytes of one argument, or of one variable as `KEY=VALUE`, with the zero byte at its end (`MAX_ARG_STRLEN`).
pub const MAX_STRING: usize = 128 * 1024;

/// Most bytes of all arguments and variables, each with a zero byte and a pointer of eight bytes: a quarter of the usual 8 MiB
/// of stack.
pub const MAX_TOTAL: usize = 2 * 1024 * 1024;

/// What is left of that for the path of the program and for the variables that the guest adds itself.
pub const RESERVE: usize = 8 * 1024;

/// Why a program could not be started with these arguments.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArgumentsError {
    /// One argument is too long.
    #[error("argument {index} of the command has {bytes} bytes, more than the {} that Linux takes", MAX_STRING - 1)]
    Argument {
        /// Which one; 0 is the program.
        index: usize,
        /// Its length.
        bytes: usize,
    },
    /// One variable is too long.
    #[error("variable {key} has {bytes} bytes with its name, more than the {} that Linux takes", MAX_STRING - 1)]
    Variable {
        /// Its name.
        key: String,
        /// Length of `KEY=VALUE`.
        bytes: usize,
    },
    /// All together are too long.
    #[error("arguments and variables of the command take {bytes} bytes, more than the {} that fit", MAX_TOTAL - RESERVE)]
    Total {
        /// What they take.
        bytes: usize,
    },
}

/// Whether a program can be started with this command and these variables.
pub fn check(open: &Open) -> Result<(), ArgumentsError> {
    const POINTER: usize = 8;
    let mut total = 2 * POINTER;
    for (index, word) in open.command.iter().enumerate() {
        let bytes = word.len();
        if bytes >= MAX_STRING {
            return Err(ArgumentsError::Argument { index, bytes });
        }
        total += bytes + 1 + POINTER;
    }
    for (key, value) in &open.env {
        let bytes = key.len() + 1 + value.len();
        if bytes >= MAX_STRING {
            let key = key.chars().take(64).collect();
            return Err(ArgumentsError::Variable { key, bytes });
        }
        total += bytes + 1 + POINTER;
    }
    if total > MAX_TOTAL - RESERVE {
        return Err(ArgumentsError::Total { bytes: total });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(words: &[usize], variables: &[(&str, usize)]) -> Open {
        Open {
            command: words.iter().map(|&n| "a".repeat(n)).collect(),
            env: variables
                .iter()
                .map(|&(key, n)| (key.to_owned(), "v".repeat(n)))
                .collect(),
            ..Open::default()
        }
    }

    #[test]
    fn the_limits_are_those_of_the_kernel() {
        assert_eq!(check(&open(&[4, MAX_STRING - 1], &[])), Ok(()));
        assert_eq!(
            check(&open(&[4, MAX_STRING], &[])),
            Err(ArgumentsError::Argument {
                index: 1,
                bytes: MAX_STRING
            })
        );
        assert_eq!(check(&open(&[4], &[("K", MAX_STRING - 3)])), Ok(()));
        assert!(matches!(
            check(&open(&[4], &[("K", MAX_STRING - 2)])),
            Err(ArgumentsError::Variable { bytes: MAX_STRING, .. })
        ));
        assert_eq!(check(&open(&[MAX_STRING - 1; 15], &[])), Ok(()));
        assert!(matches!(
            check(&open(&[MAX_STRING - 1; 16], &[])),
            Err(ArgumentsError::Total { .. })
        ));
    }

    #[test]
    fn many_small_arguments_count_with_their_pointers() {
        assert!(check(&open(&[1; 200_000], &[])).is_ok());
        assert!(check(&open(&[1; 220_000], &[])).is_err());
    }

    /// The kernel of the host says the same of the host's programs.
    #[test]
    fn the_kernel_agrees() {
        let starts = |words: &[usize]| {
            let mut command = std::process::Command::new("/bin/true");
            command.env_clear();
            for &n in &words[1..] {
                command.arg("a".repeat(n));
            }
            command.status().is_ok()
        };
        assert!(starts(&[9, MAX_STRING - 1]) && !starts(&[9, MAX_STRING]));
        assert!(starts(&[MAX_STRING - 1; 15]));
    }
}
