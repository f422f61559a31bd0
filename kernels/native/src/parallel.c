/* No OpenMP of our own: the host hands over GOMP_parallel of the runtime it has, so that there is one team of
 * threads. Tasks are taken from a counter, so a thread that is descheduled holds up only the task it has. */
#include "parallel.h"

#include <stdatomic.h>

typedef void (*gomp_parallel)(void (*run)(void *), void *data, unsigned threads, unsigned flags);

static gomp_parallel team;

struct job {
    ps_task task;
    void *context;
    int64_t count;
    atomic_llong next;
};

PS_EXPORT void ps_use_openmp(void *entry) {
    team = (gomp_parallel)entry;
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
    if (threads <= 1 || !team) {
        for (int64_t i = 0; i < count; i++)
            task(context, i);
        return;
    }
    struct job job = {task, context, count, 0};
    team(work, &job, (unsigned)threads, 0);
}
