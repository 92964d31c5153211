//! `context list`, `use`, `set` and `delete`.

use crate::args::{Cli, ContextCommand};
use crate::client;
use crate::contexts::{Context, Contexts, TokenRef, path};
use crate::error::Error;
use crate::output::Io;
use crate::tables;

pub(super) fn context(cli: &Cli, io: &mut Io<'_>, command: &ContextCommand) -> Result<(), Error> {
    let path = path()?;
    let mut contexts = Contexts::read(&path)?;
    let unknown =
        |name: &str| Error::Setting(format!("there is no context {name}; weir context list shows all"));
    match command {
        ContextCommand::List => return io.result(|| table(&contexts), || contexts.value()),
        ContextCommand::Use { name } => {
            contexts.all.get(name).ok_or_else(|| unknown(name))?;
            contexts.current = Some(name.clone());
            contexts.write(&path)?;
            io.note(&format!("the current context is {name}"))?;
        }
        ContextCommand::Set { name, token_env, switch } => {
            // A mistake is easier to see now than when the context is used.
            if cli.token_file.is_some() {
                client::token_header(cli)?;
            }
            for path in [&cli.ca, &cli.cert, &cli.key].into_iter().flatten() {
                std::fs::File::open(path)
                    .map_err(|source| Error::File { path: path.display().to_string(), source })?;
            }
            let absolute =
                |path: &std::path::PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
            let file = cli.token_file.as_ref().map(|path| TokenRef::File(absolute(path)));
            let context = Context {
                server: cli.server.to_string(),
                token: token_env.clone().map(TokenRef::Env).or(file),
                ca: cli.ca.as_ref().map(absolute),
                cert: cli.cert.as_ref().map(absolute),
                key: cli.key.as_ref().map(absolute),
            };
            let first = contexts.all.is_empty();
            contexts.all.insert(name.clone(), context);
            if *switch || first {
                contexts.current = Some(name.clone());
            }
            contexts.write(&path)?;
            let now =
                if contexts.current.as_ref() == Some(name) { "; it is the current context" } else { "" };
            io.note(&format!("context {name} is {}{now}", cli.server))?;
        }
        ContextCommand::Delete { name } => {
            contexts.all.remove(name).ok_or_else(|| unknown(name))?;
            contexts.current = contexts.current.filter(|current| current != name);
            contexts.write(&path)?;
            io.note(&format!("context {name} is deleted"))?;
        }
    }
    Ok(())
}

fn table(contexts: &Contexts) -> String {
    if contexts.all.is_empty() {
        return "there is no context; weir context set NAME --server URL --token-file FILE makes one\n"
            .to_owned();
    }
    let rows = contexts.all.iter().map(|(name, context)| {
        let current = if contexts.current.as_ref() == Some(name) { "*" } else { "" };
        let token = match (&context.token, &context.cert) {
            (Some(token), _) => token.to_string(),
            (None, Some(cert)) => format!("certificate {}", cert.display()),
            (None, None) => "WEIR_TOKEN".to_owned(),
        };
        vec![current.to_owned(), name.clone(), context.server.clone(), token]
    });
    tables::table(&["", "NAME", "SERVER", "TOKEN"], rows.collect())
}
