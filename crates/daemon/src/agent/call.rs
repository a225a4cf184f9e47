//! Every request that the daemon sends to an agent, in one table. A request can only be made of a row, so the test that walks
//! [`Call::ALL`] against an agent that never answers covers all of them.

use std::time::Duration;

use hyper::{Method, Request};

use super::link::{Body, LinkError};

/// How long a request may take at its steps.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Until the connection to the agent of a running machine is open.
    pub connect: Duration,
    /// From there to the agent's answer; in a session to the frame that says it is open.
    pub answer: Duration,
    /// In a transfer: for how long the agent may neither take nor send a byte, and how long it may take to finish a transfer
    /// whose last byte it has.
    pub transfer: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            answer: Duration::from_secs(20),
            transfer: Duration::from_secs(120),
        }
    }
}

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident: $method:ident $path:literal,)*) => {
        /// A request to the agent. Where the path ends with `/` or `=`, an argument follows it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Call {
            $($(#[$doc])* $name,)*
        }

        impl Call {
            /// All of them.
            #[cfg(test)]
            pub(crate) const ALL: &'static [Self] = &[$(Self::$name,)*];

            fn method(self) -> Method {
                match self {
                    $(Self::$name => Method::$method,)*
                }
            }

            fn path(self) -> &'static str {
                match self {
                    $(Self::$name => $path,)*
                }
            }
        }
    };
}

calls! {
    /// What the guest is and how it does.
    Health: GET "/v1/health",
    /// Gives the guest its identity.
    Personalize: POST "/v1/personalize",
    /// Lets nothing run but the agent.
    Freeze: POST "/v1/freeze",
    /// Lets a frozen guest run again.
    Renew: POST "/v1/renew",
    /// Waits for the image's init.
    System: GET "/v1/system",
    /// Lists sessions.
    Sessions: GET "/v1/sessions",
    /// Opens or joins the session of this id.
    Session: POST "/v1/sessions/",
    /// Reads files at this path.
    ReadFiles: GET "/v1/files?path=",
    /// Writes files below this path.
    WriteFiles: PUT "/v1/files?path=",
    /// Looks at this path.
    Stat: GET "/v1/stat?path=",
    /// Connects to this target.
    Connect: POST "/v1/connect?target=",
    /// Figures from inside.
    Stats: GET "/v1/stats",
    /// What the guest's clock says.
    Clock: GET "/v1/clock",
    /// Changes the guest's clock.
    AdjustClock: POST "/v1/clock",
    /// What listens for TCP.
    Ports: GET "/v1/ports",
    /// Goes down.
    Shutdown: POST "/v1/shutdown",
}

impl Call {
    /// Whether it waits while the guest is frozen to be saved. The others are what freezes it and lets it go on.
    pub(super) fn waits(self) -> bool {
        !matches!(
            self,
            Self::Health | Self::Personalize | Self::Freeze | Self::Renew | Self::Shutdown
        )
    }

    /// The path without its argument, as errors name it.
    pub fn name(self) -> &'static str {
        self.path().split('?').next().unwrap_or_default().trim_end_matches('/')
    }

    /// The request, with an argument where the path takes one.
    pub(super) fn request(self, argument: &str, body: Body) -> Result<Request<Body>, LinkError> {
        let uri = format!("http://agent{}{}", self.path(), query_value(argument));
        Request::builder()
            .method(self.method())
            .uri(&uri)
            .body(body)
            .map_err(|e| LinkError::Answer {
                what: self.name().to_owned(),
                why: format!("an impossible request: {e}"),
            })
    }
}

/// Encodes a value for a query.
fn query_value(text: &str) -> String {
    text.bytes().fold(String::with_capacity(text.len()), |mut out, b| {
        match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' | b':' => {
                out.push(char::from(b));
            }
            _ => out.push_str(&format!("%{b:02X}")),
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_values_are_encoded() {
        assert_eq!(query_value("/a b&c=ü?#%"), "/a%20b%26c%3D%C3%BC%3F%23%25");
    }

    #[test]
    fn a_request_carries_its_argument() {
        let of = |call: Call, argument: &str| {
            let request = call.request(argument, super::super::calls::empty()).unwrap();
            format!("{} {}", request.method(), request.uri())
        };
        assert_eq!(of(Call::Stat, "/a b"), "GET http://agent/v1/stat?path=/a%20b");
        assert_eq!(
            of(Call::Connect, "tcp:80"),
            "POST http://agent/v1/connect?target=tcp:80"
        );
        assert_eq!(of(Call::Session, "0f"), "POST http://agent/v1/sessions/0f");
        assert_eq!(Call::Session.name(), "/v1/sessions");
    }
}
