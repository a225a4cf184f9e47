//! The URL of a remote, without what nobody in the machine may learn.

/// The URL as it may be shown to the guest: passwords, tokens and queries are left out, and so is a user name where it could be
/// a token. Nothing for a URL that makes no sense as one.
pub(crate) fn without_secrets(url: &str) -> Option<String> {
    if url.is_empty() || url.starts_with('-') || url.contains(char::is_control) {
        return None;
    }
    let Some((scheme, rest)) = url.split_once("://") else {
        // `user@host:path` and local paths hold no password.
        return Some(url.to_owned());
    };
    let (authority, path) = match rest.find('/') {
        Some(at) => rest.split_at(at),
        None => (rest, ""),
    };
    let path = path.split(['?', '#']).next().unwrap_or_default();
    let host = match authority.rsplit_once('@') {
        // For HTTP the user name alone can be a token; for SSH it is needed.
        Some((user, host)) if scheme.ends_with("ssh") || scheme == "git" => {
            format!("{}@{host}", user.split(':').next().unwrap_or_default())
        }
        Some((_, host)) => host.to_owned(),
        None => authority.to_owned(),
    };
    Some(format!("{scheme}://{host}{path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_left_out() {
        for (url, shown) in [
            ("https://example.org/a.git", Some("https://example.org/a.git")),
            (
                "https://user:token@example.org/a.git",
                Some("https://example.org/a.git"),
            ),
            (
                "https://token@example.org:8443/a.git?private_token=x#y",
                Some("https://example.org:8443/a.git"),
            ),
            ("https://a:b@c@example.org/a", Some("https://example.org/a")),
            ("ssh://git@example.org/a.git", Some("ssh://git@example.org/a.git")),
            (
                "ssh://git:secret@example.org/a.git",
                Some("ssh://git@example.org/a.git"),
            ),
            ("git@example.org:a/b.git", Some("git@example.org:a/b.git")),
            ("/srv/git/a.git", Some("/srv/git/a.git")),
            ("https://example.org", Some("https://example.org")),
            ("--upload-pack=x", None),
            ("", None),
            ("https://a\nb/c", None),
        ] {
            assert_eq!(without_secrets(url).as_deref(), shown, "{url}");
        }
    }
}
