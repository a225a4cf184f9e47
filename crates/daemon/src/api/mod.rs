//! The API: HTTP/1.1 with JSON over the Unix socket. Routes and the OpenAPI document come from the same handlers.

mod audit;
mod daemon;
mod extract;
mod guest;
mod logs;
mod machines;
mod network;
mod operations;
mod saved;
mod stock;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::Uri;
use banger_proto::error::{ApiError, ErrorCode};
use utoipa::openapi::{InfoBuilder, OpenApi, OpenApiBuilder};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::error::Failure;
use crate::services::Services;

/// Largest JSON body of a request.
const MAX_BODY: usize = 256 * 1024;

type App = Arc<Services>;

fn all() -> OpenApiRouter<App> {
    let info = InfoBuilder::new()
        .title("banger daemon")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(
            "The daemon's API on its Unix socket. Errors have a status of 400 or above and an `ErrorBody`. Long work is an \
             operation: its request is answered with 202 and an `Accepted`, and `/v1/operations/{id}/events` follows it.",
        ))
        .build();
    OpenApiRouter::with_openapi(OpenApiBuilder::new().info(info).build())
        .routes(routes!(daemon::version))
        .routes(routes!(daemon::status))
        .routes(routes!(daemon::stop))
        .routes(routes!(daemon::doctor))
        .routes(routes!(audit::look))
        .routes(routes!(audit::fix))
        .routes(routes!(daemon::openapi))
        .routes(routes!(machines::list, machines::create))
        .routes(routes!(machines::show, machines::patch, machines::delete))
        .routes(routes!(machines::start))
        .routes(routes!(machines::restart))
        .routes(routes!(machines::stop))
        .routes(routes!(machines::kill))
        .routes(routes!(machines::wait))
        .routes(routes!(machines::stats))
        .routes(routes!(saved::pause))
        .routes(routes!(saved::resume))
        .routes(routes!(saved::suspend))
        .routes(routes!(saved::snapshots, saved::take_snapshot))
        .routes(routes!(saved::snapshot, saved::delete_snapshot))
        .routes(routes!(saved::restore))
        .routes(routes!(saved::fork))
        .routes(routes!(saved::commit))
        .routes(routes!(saved::templates, saved::build_template))
        .routes(routes!(saved::prune_templates))
        .routes(routes!(saved::template, saved::delete_template))
        .routes(routes!(logs::logs))
        .routes(routes!(machines::recoverable))
        .routes(routes!(machines::recover_one))
        .routes(routes!(guest::sessions))
        .routes(routes!(guest::attach))
        .routes(routes!(guest::read_files, guest::write_files))
        .routes(routes!(guest::stat))
        .routes(routes!(guest::connect))
        .routes(routes!(guest::hold))
        .routes(routes!(network::ports))
        .routes(routes!(stock::images, stock::build_image))
        .routes(routes!(stock::image, stock::delete_image))
        .routes(routes!(stock::kernels, stock::import_kernel))
        .routes(routes!(stock::kernel, stock::delete_kernel))
        .routes(routes!(stock::recipes))
        .routes(routes!(operations::list))
        .routes(routes!(operations::show, operations::cancel))
        .routes(routes!(operations::events))
}

/// The routes.
pub fn router(services: App) -> Router {
    let (router, _) = all().split_for_parts();
    router
        .fallback(|uri: Uri| async move {
            let path: String = uri.path().chars().take(100).flat_map(char::escape_default).collect();
            Failure(ApiError::new(
                ErrorCode::NotFound,
                format!("there is nothing at {path}"),
            ))
        })
        .method_not_allowed_fallback(|| async {
            Failure(ApiError::new(
                ErrorCode::BadRequest,
                "this path does not take this method",
            ))
        })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(services)
}

/// The document.
pub fn document() -> OpenApi {
    all().into_openapi()
}

#[cfg(test)]
mod tests {
    #[test]
    fn generated_document_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/openapi.json");
        let mut now = super::document().to_pretty_json().unwrap();
        now.push('\n');
        if std::env::var_os("BLESS").is_some() {
            std::fs::write(path, &now).unwrap();
        }
        let kept = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            kept == now,
            "docs/openapi.json is not what the handlers say; `make docs` writes it anew"
        );
    }
}
