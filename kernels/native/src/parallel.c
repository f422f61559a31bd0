/* No OpenMP of our own: the host hands over GOMP_parallel of the runtime it has, so that there is one team of
 * threads. Tasks are taken from a counter, so a thread that is descheduled holds up only the task it has. */
#include "parallel.h"
#include "team.h"

#include <stdatomic.h>

typedef void (*gomp_parallel)(void (*run)(void *), void *data, unsigned threads, unsigned flags);

static gomp_parallel runtime;
static _Thread_local struct team *leads; /* the team that this thread shares its jobs with */

struct job {
    ps_task task;
    void *context;
    int64_t count;
    atomic_llong next;
};

struct session {
    struct team team;
    void (*body)(void *context);
    void *context;
};

PS_EXPORT void ps_use_openmp(void *entry) {
    runtime = (gomp_parallel)entry;
}

static void work(void *data) {
    struct job *job = data;
    for (;;) {
        int64_t index = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
        if (index >= job->count)
            return;
        job->task(job->context, index);
    }
}

void ps_parallel(ps_task task, void *context, int64_t count, int threads) {
    if (threads > count)
        threads = (int)count;
    if (threads <= 1 || !runtime) {
        for (int64_t i = 0; i < count; i++)
            task(context, i);
        return;
    }
    struct job job = {task, context, count, 0};
    if (leads)
        team_share(leads, work, &job);
    else
        runtime(work, &job, (unsigned)threads, 0);
}

static void take_part(void *data) {
    struct session *session = data;
    if (leads != &session->team) {
        team_follow(&session->team);
        return;
    }
    session->body(session->context);
    team_end(&session->team);
}

void ps_with_team(void (*body)(void *context), void *context, int threads) {
    if (threads <= 1 || !runtime || leads) {
        body(context);
        return;
    }
    struct session session = {.body = body, .context = context};
    leads = &session.team;
    runtime(take_part, &session, (unsigned)threads, 0);
    leads = 0;
}

struct calls {
    void (*task)(int64_t index);
};

static void call(void *context, int64_t index) {
    ((const struct calls *)context)->task(index);
}

/* For tasks that are not the library's. */
PS_EXPORT int PS_FN(run_tasks)(void (*task)(int64_t index), int64_t count, int threads) {
    struct calls calls = {task};
    ps_parallel(call, &calls, count, threads);
    return PS_OK;
}
