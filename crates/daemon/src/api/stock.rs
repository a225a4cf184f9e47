//! Images and kernels.

use std::path::PathBuf;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use banger_core::spec::DEFAULT_KERNEL;
use banger_image::recipe;
use banger_proto::api::{Accepted, BuildImage, Image, ImportKernel, Kernel};
use banger_proto::error::{ApiError, ErrorBody, ErrorCode};
use serde::Serialize;
use utoipa::ToSchema;

use super::App;
use super::extract::Body;
use crate::error::Failure;
use crate::stock::unknown;

type Answer<T> = Result<T, Failure>;

/// Images.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Images {
    /// By name.
    images: Vec<Image>,
}

/// Images in the store.
#[utoipa::path(get, path = "/v1/images", tag = "images", responses((status = 200, body = Images)))]
pub(super) async fn images(State(app): State<App>) -> Answer<Json<Images>> {
    Ok(Json(Images {
        images: app.stock.images(&app).await?,
    }))
}

/// Builds one of the default images. An image that is there already is left as it is, unless `force` is set.
#[utoipa::path(post, path = "/v1/images", tag = "images", request_body = BuildImage,
    responses((status = 202, body = Accepted), (status = "4XX", body = ErrorBody)))]
pub(super) async fn build_image(
    State(app): State<App>,
    Body(request): Body<BuildImage>,
) -> Answer<(StatusCode, Json<Accepted>)> {
    if recipe::find(&request.name).is_none() {
        return Err(Failure(unknown("image recipe", &request.name, &recipe::names())));
    }
    let op = app.ops.begin("image.build", &request.name);
    let accepted = Accepted {
        operation: op.snapshot(),
        machine: None,
    };
    tokio::spawn(async move {
        let work = async {
            let made = async {
                if request.force {
                    app.stock.build_image(&request.name, &op).await
                } else {
                    app.stock.image(&request.name, &op).await
                }
            };
            tokio::select! {
                () = op.canceled().cancelled() => Err(crate::ops::canceled()),
                made = made => made,
            }
        };
        app.ops.run(&op, work).await
    });
    Ok((StatusCode::ACCEPTED, Json(accepted)))
}

/// One image.
#[utoipa::path(get, path = "/v1/images/{ref}", tag = "images", params(("ref" = String, Path)),
    responses((status = 200, body = Image), (status = "4XX", body = ErrorBody)))]
pub(super) async fn image(State(app): State<App>, Path(name): Path<String>) -> Answer<Json<Image>> {
    let images = app.stock.images(&app).await?;
    let known: Vec<String> = images.iter().map(|i| i.name.clone()).collect();
    let found = images.into_iter().find(|i| i.name == name || i.digest == name);
    found.map(Json).ok_or_else(|| Failure(missing("image", &name, &known)))
}

/// Removes an image that no machine uses.
#[utoipa::path(delete, path = "/v1/images/{ref}", tag = "images", params(("ref" = String, Path)),
    responses((status = 204), (status = "4XX", body = ErrorBody)))]
pub(super) async fn delete_image(State(app): State<App>, Path(name): Path<String>) -> Answer<StatusCode> {
    app.reconciled().await?;
    app.stock.delete_image(&app, &name).await?;
    tracing::info!(image = name, "image deleted");
    // No machine is made of it any more, nor started from its templates.
    if let Err(e) = app.templates.prune(&app, false).await {
        tracing::warn!(error = %e.message, "its templates stay for the next prune");
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Kernels.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Kernels {
    /// By name.
    kernels: Vec<Kernel>,
}

/// Kernels in the store.
#[utoipa::path(get, path = "/v1/kernels", tag = "kernels", responses((status = 200, body = Kernels)))]
pub(super) async fn kernels(State(app): State<App>) -> Answer<Json<Kernels>> {
    Ok(Json(Kernels {
        kernels: app.stock.kernels(&app).await?,
    }))
}

/// Imports a kernel. One that is there already is left as it is, unless `force` is set.
#[utoipa::path(post, path = "/v1/kernels", tag = "kernels", request_body = ImportKernel,
    responses((status = 202, body = Accepted), (status = "4XX", body = ErrorBody)))]
pub(super) async fn import_kernel(
    State(app): State<App>,
    Body(request): Body<ImportKernel>,
) -> Answer<(StatusCode, Json<Accepted>)> {
    let name = if request.name.is_empty() {
        DEFAULT_KERNEL.to_owned()
    } else {
        request.name
    };
    let fits = name.len() <= 63
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
    if !fits {
        let message = "the name of a kernel has 1 to 63 characters of a-z, A-Z, 0-9, `.`, `-` and `_`";
        return Err(Failure(ApiError::new(ErrorCode::InvalidSpec, message)));
    }
    let from = request.from.map(PathBuf::from);
    if let Some(from) = &from
        && !from.is_absolute()
    {
        return Err(Failure(ApiError::new(
            ErrorCode::BadRequest,
            "the path of a kernel package is absolute",
        )));
    }
    if let Some(from) = &from
        && !from.is_file()
    {
        return Err(Failure(ApiError::new(
            ErrorCode::NotFound,
            format!("there is no file {}", from.display()),
        )));
    }
    let there = app.stock.kernels(&app).await?.iter().any(|k| k.name == name);
    if there && from.is_some() && !request.force {
        let message = format!("there is a kernel `{name}` already");
        return Err(Failure(
            ApiError::new(ErrorCode::Conflict, message).hint("give another --name, or --force"),
        ));
    }
    let op = app.ops.begin("kernel.import", &name);
    let accepted = Accepted {
        operation: op.snapshot(),
        machine: None,
    };
    tokio::spawn(async move {
        let work = async {
            let made = async {
                if there && !request.force {
                    app.stock.kernel(&name, &op).await
                } else {
                    app.stock.import_kernel(&name, from, &op).await
                }
            };
            tokio::select! {
                () = op.canceled().cancelled() => Err(crate::ops::canceled()),
                made = made => made,
            }
        };
        app.ops.run(&op, work).await
    });
    Ok((StatusCode::ACCEPTED, Json(accepted)))
}

/// One kernel.
#[utoipa::path(get, path = "/v1/kernels/{ref}", tag = "kernels", params(("ref" = String, Path)),
    responses((status = 200, body = Kernel), (status = "4XX", body = ErrorBody)))]
pub(super) async fn kernel(State(app): State<App>, Path(name): Path<String>) -> Answer<Json<Kernel>> {
    let kernels = app.stock.kernels(&app).await?;
    let known: Vec<String> = kernels.iter().map(|k| k.name.clone()).collect();
    let found = kernels.into_iter().find(|k| k.name == name || k.digest == name);
    found.map(Json).ok_or_else(|| Failure(missing("kernel", &name, &known)))
}

/// Removes a kernel that no machine uses.
#[utoipa::path(delete, path = "/v1/kernels/{ref}", tag = "kernels", params(("ref" = String, Path)),
    responses((status = 204), (status = "4XX", body = ErrorBody)))]
pub(super) async fn delete_kernel(State(app): State<App>, Path(name): Path<String>) -> Answer<StatusCode> {
    app.reconciled().await?;
    app.stock.delete_kernel(&app, &name).await?;
    tracing::info!(kernel = name, "kernel deleted");
    Ok(StatusCode::NO_CONTENT)
}

/// What can be built.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Recipes {
    /// By name.
    recipes: Vec<Recipe>,
}

/// A default image.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Recipe {
    /// Name of the recipe and of the image.
    name: String,
    /// One sentence.
    description: String,
}

/// Images that banger can build.
#[utoipa::path(get, path = "/v1/recipes", tag = "images", responses((status = 200, body = Recipes)))]
pub(super) async fn recipes() -> Json<Recipes> {
    let recipe = |r: &recipe::Recipe| Recipe {
        name: r.name.to_owned(),
        description: r.summary.to_owned(),
    };
    Json(Recipes {
        recipes: recipe::RECIPES.iter().map(recipe).collect(),
    })
}

fn missing(kind: &str, name: &str, known: &[String]) -> ApiError {
    unknown(kind, name, &known.iter().map(String::as_str).collect::<Vec<_>>())
}
